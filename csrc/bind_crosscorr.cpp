#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "crosscorr.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kStandardize = "crosscorr_standardize";
constexpr const char* kThrough = "crosscorr_through_standardize";

void check(const char* operation, const Batches& batches, int threads) {
  if (batches.stages == 0 || batches.batch == 0 || batches.features == 0)
    throw std::invalid_argument(std::string(operation) + ": sizes must be at least 1");
  check_threads(operation, threads);
}

void bound_standardize(std::uintptr_t z1, std::uintptr_t z2, std::uintptr_t s1, std::uintptr_t s2, std::uintptr_t r1,
                       std::uintptr_t r2, std::uintptr_t diagonal, double epsilon, std::size_t stages,
                       std::size_t batch, std::size_t features, int threads) {
  const Batches batches{stages, batch, features};
  check(kStandardize, batches, threads);
  const auto matrix = [](std::uintptr_t address) { return pointer<float>(kStandardize, address, 1); };
  standardize(matrix(z1), matrix(z2), matrix(s1), matrix(s2), matrix(r1), matrix(r2), matrix(diagonal), epsilon,
              batches, threads);
}

void bound_through(std::uintptr_t product, std::uintptr_t other, std::uintptr_t weight, std::uintptr_t s,
                   std::uintptr_t r, double alpha, std::size_t stages, std::size_t batch, std::size_t features,
                   int threads) {
  const Batches batches{stages, batch, features};
  check(kThrough, batches, threads);
  const auto matrix = [](std::uintptr_t address) { return pointer<float>(kThrough, address, 1); };
  through_standardize(matrix(product), matrix(other), matrix(weight), matrix(s), matrix(r), alpha, batches, threads);
}

}  // namespace

void bind_crosscorr(py::module_& module) {
  module.def(kStandardize, &bound_standardize, py::arg("z1"), py::arg("z2"), py::arg("s1"), py::arg("s2"),
             py::arg("r1"), py::arg("r2"), py::arg("diagonal"), py::kw_only(), py::arg("epsilon"), py::arg("stages"),
             py::arg("batch"), py::arg("features"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "s <- r * (z - mean), r = 1 / sqrt(variance + epsilon), for both z; diagonal <- mean(s1 * s2).\n\n"
             "Addresses of float32: z and s are (stages, batch, features), r and diagonal (stages, features); means\n"
             "are over the batch. Raises ValueError for a null or unaligned address, a size of 0, or fewer than one\n"
             "thread.");
  module.def(kThrough, &bound_through, py::arg("product"), py::arg("other"), py::arg("weight"), py::arg("s"),
             py::arg("r"), py::kw_only(), py::arg("alpha"), py::arg("stages"), py::arg("batch"), py::arg("features"),
             py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "product <- r * (d - s * mean(d * s)) with d = alpha * product + weight * other.\n\n"
             "Addresses of float32: product, other and s are (stages, batch, features), weight and r (stages,\n"
             "features). The columns of product and other must sum to zero over the batch. What is refused is as in\n"
             "crosscorr_standardize.");
}

}  // namespace fastmoco
