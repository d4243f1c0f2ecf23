#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "ema.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "ema_update";

template <typename T>
void ema_update_as(const std::vector<std::uintptr_t>& targets, const std::vector<std::uintptr_t>& sources,
                   const std::vector<std::size_t>& sizes, double momentum, int threads) {
  std::vector<Pair<T>> pairs;
  pairs.reserve(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    pairs.push_back({pointer<T>(kName, targets[i], sizes[i]), pointer<T>(kName, sources[i], sizes[i]), sizes[i]});
  }
  const py::gil_scoped_release release;
  fastmoco::ema_update(pairs, momentum, threads);
}

void bound(const std::vector<std::uintptr_t>& targets, const std::vector<std::uintptr_t>& sources,
                const std::vector<std::size_t>& sizes, double momentum, const std::string& dtype, int threads) {
  if (targets.size() != sources.size() || targets.size() != sizes.size())
    throw std::invalid_argument("ema_update: targets, sources and sizes differ in length");
  if (!(momentum >= 0.0 && momentum <= 1.0)) throw std::invalid_argument("ema_update: momentum must lie in [0, 1]");
  check_threads(kName, threads);
  if (dtype == "float32") {
    ema_update_as<float>(targets, sources, sizes, momentum, threads);
  } else if (dtype == "float64") {
    ema_update_as<double>(targets, sources, sizes, momentum, threads);
  } else {
    throw std::invalid_argument("ema_update: dtype must be float32 or float64, not " + dtype);
  }
}

}  // namespace

void bind_ema(py::module_& module) {
  module.def("ema_update", &bound, py::arg("targets"), py::arg("sources"), py::arg("sizes"), py::kw_only(),
             py::arg("momentum"), py::arg("dtype"), py::arg("threads"),
             "targets[i][:sizes[i]] <- momentum * targets[i] + (1 - momentum) * sources[i], in place.\n\n"
             "targets, sources: addresses of dense memory; sizes: elements; dtype: 'float32' or 'float64'.\n"
             "Raises ValueError for lists of different lengths, a null or unaligned address, a momentum outside\n"
             "[0, 1], another dtype, or fewer than one thread.");
}

}  // namespace fastmoco
