// One launch over many tensors, the list of them passed by value as the kernel's parameter: nothing is allocated or
// copied beforehand, so the launch can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "chunks.h"
#include "cuda_place.h"

namespace fastmoco {

constexpr int kThreads = 256;

// Kernel parameters may take this many bytes (on sm_70 and later, from CUDA 12.1 on).
#if CUDART_VERSION >= 12010
constexpr std::size_t kParameterBytes = 32764;
#else
constexpr std::size_t kParameterBytes = 4096;
#endif

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <typename Function>
__global__ void __launch_bounds__(kThreads)
    over_chunks(const __grid_constant__ Table<Function, kParameterBytes> table,
                const __grid_constant__ Function function) {
  run_chunk(table, function, blockIdx.x, threadIdx.x, kThreads);
}

// Runs `function` on every element of `tensors`, on the place's stream. Throws std::runtime_error with CUDA's message
// where it cannot be launched. Each element is computed from its own operands alone, so results do not depend on how
// the work is cut.
template <typename Function>
void launch(const std::vector<typename Function::Tensor>& tensors, const Function& function, CudaPlace place) {
  check(cudaSetDevice(place.device));
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  tabulate<kParameterBytes>(tensors, function, [&](const Table<Function, kParameterBytes>& table) {
    over_chunks<Function><<<table.chunks(), kThreads, 0, stream>>>(table, function);
    check(cudaGetLastError());
  });
}

}  // namespace fastmoco
