#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_windows.h"
#include "convolve.h"
#include "winograd.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "convolve";

MapDtype map_dtype(const std::string& dtype) {
  if (dtype != "bfloat16" && dtype != "float32")
    throw std::invalid_argument("convolve: dtype must be bfloat16 or float32, not " + dtype);
  return dtype == "bfloat16" ? MapDtype::kBFloat16 : MapDtype::kFloat32;
}

std::vector<std::string> sets(const std::string& dtype) { return convolve_sets(map_dtype(dtype)); }

// What a call has said of its maps; the one of `channels` is convolved, that of `out` comes of it.
struct Call {
  Call(const std::array<std::size_t, 4>& map, std::size_t out, const Pair& kernel, const Pair& stride,
       const Pair& padding, const std::string& dtype, const std::string& instruction_set, int threads)
      : set(instruction_set),
        of{windows(kName, map, kernel, stride, padding, threads), out, map_dtype(dtype), set.c_str()} {}
  Call(const Call&) = delete;

  // Throws for channels that no function takes but, where the map has `few`, convolve_few.
  void check_channels(bool few) const {
    const std::size_t in = of.at.channels, element = of.dtype == MapDtype::kBFloat16 ? 2 : 4;
    const bool fits = few ? of.at.stride_w * in * element % 4 == 0 : in % kChannelBlock == 0;
    if (in == 0 || of.out == 0 || !fits || of.out % kChannelBlock != 0)
      throw std::invalid_argument(
          "convolve: channels must be multiples of " + std::to_string(kChannelBlock) +
          (few ? " of the result, and of the map times the stride whole words" : "") + ", not " + std::to_string(in) +
          " and " + std::to_string(of.out));
  }

  std::size_t map() const { return of.at.images * of.at.height * of.at.width * of.at.channels; }
  std::size_t result() const { return of.at.images * of.at.down() * of.at.across() * of.out; }
  std::size_t weights() const { return of.out * of.at.taps() * of.at.channels; }

  std::string set;
  Convolution of;
};

// Words of 32 bits hold two bfloat16, so that an address of either dtype must be one of a word.
const void* from(std::uintptr_t address, std::size_t size) {
  return pointer<const std::uint32_t>(kName, address, size);
}
void* to(std::uintptr_t address, std::size_t size) { return pointer<std::uint32_t>(kName, address, size); }

template <typename Run>
auto bound(Run run, bool few) {
  return [run, few](std::uintptr_t first, std::uintptr_t second, std::uintptr_t result,
               const std::array<std::size_t, 4>& map, std::size_t out, const Pair& kernel, const Pair& stride,
               const Pair& padding, const std::string& dtype, const std::string& instruction_set, int threads) {
    const Call call(map, out, kernel, stride, padding, dtype, instruction_set, threads);
    call.check_channels(few);
    run(first, second, result, call);
  };
}

using Function = void (*)(const void*, const void*, void*, const Convolution&);

// Of either form, as the definition sums or by Winograd's products.
void run(Function form, const void* first, const void* second, void* result, const Call& call) {
  const py::gil_scoped_release release;
  form(first, second, result, call.of);
}

template <Function kForm>
void run_forward(std::uintptr_t x, std::uintptr_t weights, std::uintptr_t y, const Call& call) {
  run(kForm, from(x, call.map()), from(weights, call.weights()), to(y, call.result()), call);
}

template <Function kForm>
void run_map_gradient(std::uintptr_t dy, std::uintptr_t weights, std::uintptr_t dx, const Call& call) {
  run(kForm, from(dy, call.result()), from(weights, call.weights()), to(dx, call.map()), call);
}

template <Function kForm>
void run_weight_gradient(std::uintptr_t x, std::uintptr_t dy, std::uintptr_t dweights, const Call& call) {
  run(kForm, from(x, call.map()), from(dy, call.result()), to(dweights, call.weights()), call);
}

template <typename Run>
void define(py::module_& module, const char* name, Run run, const char* first, const char* second, const char* result,
            const char* text, bool few = false) {
  module.def(name, bound(run, few), py::arg(first), py::arg(second), py::arg(result), py::kw_only(), py::arg("map"),
             py::arg("out"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dtype"),
             py::arg("instruction_set"), py::arg("threads"), text);
}

}  // namespace

void bind_convolve(py::module_& module) {
  module.def("convolve_sets", &sets, py::arg("dtype"),
             "The instruction sets by which maps of `dtype`, \"bfloat16\" or \"float32\", can be convolved here, the\n"
             "best first (list of str).");
  define(module, "convolve", &run_forward<convolve>, "x", "weights", "y",
         "y (images, down, across, out) <- x, a `map` (images, height, width, channels), convolved with weights (out,\n"
         "*kernel, channels).\n"
         "\n"
         "All three are addresses of `dtype`, bfloat16 or float32, whose sums are in float32. kernel, stride and\n"
         "padding are (vertical, horizontal); instruction_set is one of convolve_sets(dtype). Raises ValueError for a\n"
         "null address or one that is no multiple of 4, for channels that are no multiples of 32, for a kernel that\n"
         "does not fit in the padded map, for a kernel, stride or threads below 1, and for an instruction set or dtype\n"
         "that is not there.");
  define(module, "convolve_few", &run_forward<convolve_few>, "x", "weights", "y",
         "y <- as by convolve, of a map with any channels, such as an image: out must be a multiple of 32, and what a\n"
         "horizontal stride passes over a multiple of 4 bytes. The rest is as for convolve.",
         true);
  define(module, "convolve_map_gradient", &run_map_gradient<convolve_map_gradient>, "dy", "weights", "dx",
         "dx <- the gradient of convolve to its map, dy being that to its result. The rest is as for convolve.");
  define(module, "convolve_weight_gradient", &run_weight_gradient<convolve_weight_gradient>, "x", "dy", "dweights",
         "dweights <- the gradient of convolve to its weights, dy being that to its result. The rest is as for\n"
         "convolve.");
  define(module, "winograd", &run_forward<winograd>, "x", "weights", "y",
         "y <- as by convolve, by Winograd's F(2 x 2, 3 x 3). A kernel must be 3 x 3, its stride 1 and padding at most\n"
         "2, or ValueError is raised. The rest is as for convolve.");
  define(module, "winograd_map_gradient", &run_map_gradient<winograd_map_gradient>, "dy", "weights", "dx",
         "dx <- the gradient of winograd to its map. The rest is as for winograd.");
  define(module, "winograd_weight_gradient", &run_weight_gradient<winograd_weight_gradient>, "x", "dy", "dweights",
         "dweights <- the gradient of winograd to its weights. The rest is as for winograd.");
}

}  // namespace fastmoco
