#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "pooled_mse.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kForward = "pooled_mse_forward";
constexpr const char* kBackward = "pooled_mse_backward";

// Calls run with a value of the element type that `dtype` names.
template <typename Run>
auto with_type(const char* operation, const std::string& dtype, const Run& run) {
  if (dtype == "float32") return run(float{});
  if (dtype == "bfloat16") return run(BFloat16{});
  if (dtype == "float16") return run(Half{});
  throw std::invalid_argument(std::string(operation) + ": dtype must be float32, bfloat16 or float16, not " + dtype);
}

void check(const char* operation, const Maps& m, int threads) {
  if (m.batch == 0 || m.height == 0 || m.width == 0 || m.channels == 0 || m.grid == 0)
    throw std::invalid_argument(std::string(operation) + ": sizes must be at least 1");
  check_threads(operation, threads);
}

std::size_t pixels(const Maps& m) { return m.batch * m.height * m.width * m.channels; }
std::size_t cells(const Maps& m) { return m.batch * m.grid * m.grid * m.channels; }

double forward(std::uintptr_t a, std::uintptr_t b, std::uintptr_t pooled, std::uintptr_t difference,
               std::size_t batch, std::size_t height, std::size_t width, std::size_t channels, std::size_t grid,
               const std::string& dtype, int threads) {
  const Maps maps{batch, height, width, channels, grid};
  check(kForward, maps, threads);
  if ((b == 0) == (pooled == 0))
    throw std::invalid_argument("pooled_mse_forward: give the address of b or of pooled, and 0 for the other");
  return with_type(kForward, dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = pointer<T>(kForward, a, pixels(maps));
    const T* minus = pointer<T>(kForward, b, 0);
    const float* other = pointer<float>(kForward, pooled, 0);
    float* to = pointer<float>(kForward, difference, cells(maps));
    const py::gil_scoped_release release;
    return pooled_mse_forward(from, minus, other, to, maps, threads);
  });
}

void backward(std::uintptr_t difference, std::uintptr_t da, double scale, std::size_t batch, std::size_t height,
              std::size_t width, std::size_t channels, std::size_t grid, const std::string& dtype, int threads) {
  const Maps maps{batch, height, width, channels, grid};
  check(kBackward, maps, threads);
  with_type(kBackward, dtype, [&](auto element) {
    using T = decltype(element);
    const float* from = pointer<float>(kBackward, difference, cells(maps));
    T* to = pointer<T>(kBackward, da, pixels(maps));
    const py::gil_scoped_release release;
    pooled_mse_backward(from, static_cast<float>(scale), to, maps, threads);
  });
}

}  // namespace

void bind_pooled_mse(py::module_& module) {
  module.def(kForward, &forward, py::arg("a"), py::arg("b"), py::arg("pooled"), py::arg("difference"), py::kw_only(),
             py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("grid"),
             py::arg("dtype"), py::arg("threads"),
             "difference <- pool(a) - pool(b), (batch, grid, grid, channels) float32; returns its squares' mean.\n\n"
             "a, b: addresses of (batch, height, width, channels) maps of `dtype`: 'float32', 'bfloat16' or\n"
             "'float16'. pooled: in place of b (0 then) the address of pool(b), laid out as `difference`; else 0.\n"
             "Raises ValueError for a null or unaligned address, both or neither of b and pooled, a size of 0,\n"
             "another dtype, or fewer than one thread.");
  module.def(kBackward, &backward, py::arg("difference"), py::arg("da"), py::kw_only(), py::arg("scale"),
             py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("grid"),
             py::arg("dtype"), py::arg("threads"),
             "da <- for each pixel the sum of scale * difference / area over the cells that it lies in.\n\n"
             "The addresses and what is refused are as in pooled_mse_forward.");
}

}  // namespace fastmoco
