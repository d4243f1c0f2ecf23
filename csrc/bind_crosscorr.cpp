#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "crosscorr.h"
#include "crosscorr_gram.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kStandardize = "crosscorr_standardize";
constexpr const char* kGram = "crosscorr_gram";
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

GramDtype gram_dtype(const std::string& name) {
  if (name == "float32") return GramDtype::kFloat32;
  if (name == "bfloat16") return GramDtype::kBFloat16;
  if (name == "float16") return GramDtype::kFloat16;
  throw std::invalid_argument(std::string(kGram) + ": dtype must be float32, bfloat16 or float16, not " + name);
}

void bound_gram(std::uintptr_t z1, std::uintptr_t z2, std::uintptr_t loss, std::uintptr_t dz1, std::uintptr_t dz2,
                std::uintptr_t scratch, double off_diagonal, double scale, double epsilon, std::size_t stages,
                std::size_t batch, std::size_t features, const std::string& dtype, const std::string& set,
                int threads) {
  check(kGram, Batches{stages, batch, features}, threads);
  if (batch > kGramRows) throw std::invalid_argument(std::string(kGram) + ": a batch above CROSSCORR_GRAM_ROWS");
  if ((dz1 == 0) != (dz2 == 0)) throw std::invalid_argument(std::string(kGram) + ": one gradient without the other");
  GramLoss a{};
  a.dtype = gram_dtype(dtype);
  const auto input = [&](std::uintptr_t address) -> const void* {
    if (a.dtype == GramDtype::kFloat32) return pointer<const float>(kGram, address, 1);
    return pointer<const std::uint16_t>(kGram, address, 1);
  };
  a.z1 = input(z1);
  a.z2 = input(z2);
  a.loss = pointer<float>(kGram, loss, 1);
  a.dz1 = pointer<float>(kGram, dz1, 0);
  a.dz2 = pointer<float>(kGram, dz2, 0);
  a.scratch = pointer<float>(kGram, scratch, 1);
  a.stages = stages;
  a.batch = batch;
  a.features = features;
  a.off_diagonal = off_diagonal;
  a.scale = scale;
  a.epsilon = epsilon;
  a.threads = threads;
  a.instruction_set = set.c_str();
  const py::gil_scoped_release release;
  gram_loss(a);
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
  module.attr("CROSSCORR_GRAM_ROWS") = kGramRows;
  module.attr("CROSSCORR_GRAM_SETS") = gram_sets();
  module.def("crosscorr_gram_scratch", &gram_scratch, py::arg("stages"), py::arg("batch"), py::arg("features"),
             "How many float32 of scratch crosscorr_gram needs.");
  module.def(kGram, &bound_gram, py::arg("z1"), py::arg("z2"), py::arg("loss"), py::arg("dz1"), py::arg("dz2"),
             py::arg("scratch"), py::kw_only(), py::arg("off_diagonal"), py::arg("scale"), py::arg("epsilon"),
             py::arg("stages"), py::arg("batch"), py::arg("features"), py::arg("dtype"), py::arg("instruction_set"),
             py::arg("threads"),
             "The losses and, unless dz1 and dz2 are 0, their gradients, through Gram matrices, in one call.\n\n"
             "Addresses: z1 and z2 of `dtype` (float32, bfloat16 or float16) and dz1 and dz2 of float32 are (stages,\n"
             "batch, features); loss (stages) and scratch are float32. instruction_set: one of CROSSCORR_GRAM_SETS,\n"
             "'' for the best. The same bits with any number of threads. Raises ValueError for what\n"
             "crosscorr_standardize refuses, another dtype or instruction set, a batch above CROSSCORR_GRAM_ROWS, or\n"
             "one gradient without the other.");
}

}  // namespace fastmoco
