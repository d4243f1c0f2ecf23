#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind_windows.h"
#include "max_pool.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kForward = "max_pool";
constexpr const char* kBackward = "max_pool_backward";

// As of any kernel, which pooling wants small, and no more than half of it beside the map.
Windows pools(const char* operation, const std::array<std::size_t, 4>& map, const Pair& kernel, const Pair& stride,
              const Pair& padding, int threads) {
  const std::string name(operation);
  if (kernel[0] > kMostTaps || kernel[1] > kMostTaps || kernel[0] * kernel[1] > kMostTaps)
    throw std::invalid_argument(name + ": a kernel has " + std::to_string(kMostTaps) + " taps at most");
  const Windows at = windows(operation, map, kernel, stride, padding, threads);
  if (padding[0] > kernel[0] / 2 || padding[1] > kernel[1] / 2)
    throw std::invalid_argument(name + ": the padding must be at most half of the kernel");
  // Padding alone has nothing to take.
  if (at.height == 0 || at.width == 0)
    throw std::invalid_argument(name + ": the kernel is larger than the padded map");
  return at;
}

std::size_t places(const Windows& at) { return at.images * at.height * at.width * at.channels; }
std::size_t results(const Windows& at) { return at.images * at.down() * at.across() * at.channels; }

void forward(std::uintptr_t x, std::uintptr_t y, std::uintptr_t index, const std::array<std::size_t, 4>& map,
             const Pair& kernel, const Pair& stride, const Pair& padding, const std::string& dtype, int threads) {
  const Windows at = pools(kForward, map, kernel, stride, padding, threads);
  auto* const of = pointer<std::uint8_t>(kForward, index, 0);
  by_dtype(kForward, dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = pointer<const T>(kForward, x, places(at));
    T* to = pointer<T>(kForward, y, results(at));
    const py::gil_scoped_release release;
    max_pool<T>(from, to, of, at);
  });
}

void backward(std::uintptr_t dy, std::uintptr_t index, std::uintptr_t dx, const std::array<std::size_t, 4>& map,
              const Pair& kernel, const Pair& stride, const Pair& padding, const std::string& dtype, int threads) {
  const Windows at = pools(kBackward, map, kernel, stride, padding, threads);
  const auto* of = pointer<const std::uint8_t>(kBackward, index, results(at));
  by_dtype(kBackward, dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = pointer<const T>(kBackward, dy, results(at));
    T* to = pointer<T>(kBackward, dx, places(at));
    const py::gil_scoped_release release;
    max_pool_backward<T>(from, of, to, at);
  });
}

}  // namespace

void bind_max_pool(py::module_& module) {
  module.def(kForward, &forward, py::arg("x"), py::arg("y"), py::arg("index"), py::kw_only(), py::arg("map"),
             py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dtype"), py::arg("threads"),
             "y <- the largest that each window of the kernel covers of x, index <- the tap that lay over it.\n"
             "\n"
             "x is the address of a `map` (images, height, width, channels) of `dtype`, bfloat16 or float32, y of\n"
             "(images, down, across, channels), index of as many uint8, 0 where they are not wanted. Taps count row\n"
             "by row. kernel, stride and padding are (vertical, horizontal).\n"
             "Raises ValueError for a null or unaligned address, another dtype, a kernel that does not fit in the\n"
             "padded map or has more than 255 taps, a padding of more than half of it, and for a kernel, stride or\n"
             "threads below 1.");
  module.def(kBackward, &backward, py::arg("dy"), py::arg("index"), py::arg("dx"), py::kw_only(), py::arg("map"),
             py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dtype"), py::arg("threads"),
             "dx <- the gradient of what max_pool made, from dy and the index it left.\n"
             "\n"
             "Raises ValueError as the forward does.");
}

}  // namespace fastmoco
