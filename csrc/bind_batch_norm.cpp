#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "batch_norm.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kForward = "batch_norm_forward";
constexpr const char* kBackward = "batch_norm_backward";
constexpr const char* kTrack = "batch_norm_track";

void check(const char* operation, const Pixels& map) {
  if (map.rows < 2 || map.channels == 0)
    throw std::invalid_argument(std::string(operation) + ": needs at least 2 rows and 1 channel");
  check_threads(operation, map.threads);
}

void forward(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t y,
             std::uintptr_t statistics, double epsilon, bool relu, std::size_t rows, std::size_t channels,
             const std::string& dtype, int threads) {
  const Pixels map{rows, channels, threads};
  check(kForward, map);
  const std::size_t size = rows * channels;
  float* of = pointer<float>(kForward, statistics, 3 * channels);
  const Channels k{pointer<float>(kForward, weight, channels), pointer<float>(kForward, bias, channels), of,
                   of + channels};
  by_dtype(kForward, dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = pointer<T>(kForward, x, size);
    const T* plus = pointer<T>(kForward, residual, 0);
    T* to = pointer<T>(kForward, y, size);
    const py::gil_scoped_release release;
    batch_norm_forward(from, plus, to, k, of + 2 * channels, epsilon, relu, map);
  });
}

void backward(std::uintptr_t dy, std::uintptr_t x, std::uintptr_t y, std::uintptr_t weight, std::uintptr_t bias,
              std::uintptr_t statistics, std::uintptr_t dx, std::uintptr_t dresidual, std::uintptr_t dweight,
              std::uintptr_t dbias, bool relu, std::size_t rows, std::size_t channels, const std::string& dtype,
              int threads) {
  const Pixels map{rows, channels, threads};
  check(kBackward, map);
  if ((y == 0) != (dresidual == 0) || (y != 0 && !relu))
    throw std::invalid_argument("batch_norm_backward: y and dresidual go together, and with relu");
  const std::size_t size = rows * channels;
  float* of = pointer<float>(kBackward, statistics, 3 * channels);
  const Channels k{pointer<float>(kBackward, weight, channels), pointer<float>(kBackward, bias, channels), of,
                   of + channels};
  float* to_weight = pointer<float>(kBackward, dweight, channels);
  float* to_bias = pointer<float>(kBackward, dbias, channels);
  by_dtype(kBackward, dtype, [&](auto element) {
    using T = decltype(element);
    const T* upstream = pointer<T>(kBackward, dy, size);
    const T* from = pointer<T>(kBackward, x, size);
    const T* sign = pointer<T>(kBackward, y, 0);
    T* to = pointer<T>(kBackward, dx, size);
    T* beside = pointer<T>(kBackward, dresidual, 0);
    const py::gil_scoped_release release;
    batch_norm_backward(upstream, from, sign, to, beside, k, to_weight, to_bias, relu, map);
  });
}

void track(std::uintptr_t mean, std::uintptr_t variance, std::uintptr_t batches, std::uintptr_t statistics,
           double momentum, std::size_t channels) {
  const float* of = pointer<float>(kTrack, statistics, 3 * channels);
  float* const running_mean = pointer<float>(kTrack, mean, channels);
  float* const running_variance = pointer<float>(kTrack, variance, channels);
  std::int64_t* const count = pointer<std::int64_t>(kTrack, batches, 1);
  const auto share = static_cast<float>(momentum);
  batch_norm_track(running_mean, of, share, channels);
  batch_norm_track(running_variance, of + 2 * channels, share, channels);
  ++*count;
}

}  // namespace

void bind_batch_norm(py::module_& module) {
  module.def(kForward, &forward, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("y"),
             py::arg("statistics"), py::kw_only(), py::arg("epsilon"), py::arg("relu"), py::arg("rows"),
             py::arg("channels"), py::arg("dtype"), py::arg("threads"),
             "y <- act(batch normalisation of x + residual), act being ReLU where `relu`.\n"
             "\n"
             "x, y and residual (0 for none) are addresses of (rows, channels) maps of `dtype`, bfloat16 or float32,\n"
             "weight and bias of (channels,) float32; statistics, (3, channels) float32, takes each channel's mean,\n"
             "1 / sqrt(variance + epsilon) and unbiased variance.\n"
             "Raises ValueError for a null or unaligned address, another dtype, fewer than 2 rows, no channels or\n"
             "threads below 1.");
  module.def(kBackward, &backward, py::arg("dy"), py::arg("x"), py::arg("y"), py::arg("weight"), py::arg("bias"),
             py::arg("statistics"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"),
             py::kw_only(), py::arg("relu"), py::arg("rows"), py::arg("channels"), py::arg("dtype"),
             py::arg("threads"),
             "dx, dweight, dbias and dresidual <- the gradients of what batch_norm_forward made, from dy.\n"
             "\n"
             "y and dresidual are 0 but where there was a residual and `relu`. Raises ValueError as the forward does,\n"
             "and where one of the two is 0 alone.");
  module.def(kTrack, &track, py::arg("mean"), py::arg("variance"), py::arg("batches"), py::arg("statistics"),
             py::kw_only(), py::arg("momentum"), py::arg("channels"),
             "The running mean and variance, (channels,) float32, go on by `momentum` towards those of a batch, as\n"
             "batch_norm_forward left them in `statistics`; batches, a single int64, counts it.\n"
             "Raises ValueError for a null or unaligned address.");
}

}  // namespace fastmoco
