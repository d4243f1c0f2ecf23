// The Python module fastmoco._C. It takes addresses and sizes and knows nothing of torch, so one binary serves every
// torch version. What arguments alone can show to be wrong is refused here; that an address holds `size` elements of
// the dtype named, and that tensors are dense and do not overlap, is for the caller in fastmoco/ops to have checked.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ema.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address, std::size_t size) {
  if (address == 0 && size != 0) throw std::invalid_argument("ema_update: a null address with a size above 0");
  if (address % alignof(T) != 0) throw std::invalid_argument("ema_update: an address that is not aligned to its dtype");
  return reinterpret_cast<T*>(address);
}

template <typename T>
void ema_update_as(const std::vector<std::uintptr_t>& targets, const std::vector<std::uintptr_t>& sources,
                   const std::vector<std::size_t>& sizes, double momentum, int threads) {
  std::vector<fastmoco::Pair<T>> pairs;
  pairs.reserve(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    pairs.push_back({pointer<T>(targets[i], sizes[i]), pointer<T>(sources[i], sizes[i]), sizes[i]});
  }
  const py::gil_scoped_release release;
  fastmoco::ema_update(pairs, momentum, threads);
}

void ema_update(const std::vector<std::uintptr_t>& targets, const std::vector<std::uintptr_t>& sources,
                const std::vector<std::size_t>& sizes, double momentum, const std::string& dtype, int threads) {
  if (targets.size() != sources.size() || targets.size() != sizes.size())
    throw std::invalid_argument("ema_update: targets, sources and sizes differ in length");
  if (!(momentum >= 0.0 && momentum <= 1.0)) throw std::invalid_argument("ema_update: momentum must lie in [0, 1]");
  if (threads < 1) throw std::invalid_argument("ema_update: threads must be at least 1");
  if (dtype == "float32") {
    ema_update_as<float>(targets, sources, sizes, momentum, threads);
  } else if (dtype == "float64") {
    ema_update_as<double>(targets, sources, sizes, momentum, threads);
  } else {
    throw std::invalid_argument("ema_update: dtype must be float32 or float64, not " + dtype);
  }
}

// The instruction set that FASTMOCO_CLONES functions run with here, by the order in which the loader prefers them.
std::string instruction_set() {
#if defined(FASTMOCO_HAS_CLONES)
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("fma")) return "fma";
#endif
  return "baseline";
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["instruction_set"] = instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastmoco's C++ operations on raw addresses; use them through fastmoco.ops.";
  module.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("sizes"), py::kw_only(),
             py::arg("momentum"), py::arg("dtype"), py::arg("threads"),
             "targets[i][:sizes[i]] <- momentum * targets[i] + (1 - momentum) * sources[i], in place.\n\n"
             "targets, sources: addresses of dense memory; sizes: elements; dtype: 'float32' or 'float64'.\n"
             "Raises ValueError for lists of different lengths, a null or unaligned address, a momentum outside\n"
             "[0, 1], another dtype, or fewer than one thread.");
  module.def("build_info", &build_info,
             "What this extension was compiled with: compiler (str), openmp (bool), and the instruction_set (str)\n"
             "that runs on this processor.");
}
