// The Python module fastmoco._C, and how it was built.

#include "bindings.h"

#include <pybind11/pybind11.h>

#include <string>

#include "cuda_place.h"
#include "platform.h"

namespace py = pybind11;

namespace {

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
  const int version = fastmoco::cuda_version();
  info["cuda"] = version == 0 ? "" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["cuda_targets"] = fastmoco::cuda_description();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastmoco's C++ operations on raw addresses; use them through fastmoco.ops.";
  fastmoco::bind_batch_norm(module);
  fastmoco::bind_convolve(module);
  fastmoco::bind_crosscorr(module);
  fastmoco::bind_ema(module);
  fastmoco::bind_infonce(module);
  fastmoco::bind_max_pool(module);
  fastmoco::bind_pooled_mse(module);
  fastmoco::bind_sgd_ema(module);
  fastmoco::bind_unfold(module);
  fastmoco::bind_views(module);
  module.def("build_info", &build_info,
             "What this extension was compiled with: compiler (str), openmp (bool), the instruction_set (str)\n"
             "that runs on this processor, the cuda toolkit's version (str, empty without) and cuda_targets (str):\n"
             "the GPUs it has code for or, in a build without CUDA, why it has none.");
}
