// One launch over many tensors, the list of them passed by value as the kernel's parameter: nothing is allocated or
// copied beforehand, so the launch can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_place.h"

namespace fastmoco {

constexpr int kThreads = 256;
// Elements of a block: four packs of 16 bytes of float32 a thread. A multiple of every pack, so that blocks begin
// aligned where tensors do.
constexpr std::size_t kChunk = 4096;

// Kernel parameters may take this many bytes (on sm_70 and later, from CUDA 12.1 on).
#if CUDART_VERSION >= 12010
constexpr std::size_t kParameterBytes = 32764;
#else
constexpr std::size_t kParameterBytes = 4096;
#endif

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Tensors and, for each, the number of chunks up to its end.
template <typename Function>
struct Table {
  using Tensor = typename Function::Tensor;
  static constexpr std::size_t kRoom = kParameterBytes - sizeof(Function) - 2 * alignof(Tensor);
  static constexpr int kCapacity = static_cast<int>(kRoom / (sizeof(Tensor) + sizeof(std::uint32_t)));

  Tensor tensors[kCapacity];
  std::uint32_t ends[kCapacity];
  int count;
};

template <int kWidth, typename Function>
__device__ void run(const Function& function, const typename Function::Tensor& tensor, std::size_t begin,
                    std::size_t end) {
  const std::size_t whole = begin + (end - begin) / kWidth * kWidth;
#pragma unroll 4
  for (std::size_t i = begin + threadIdx.x * kWidth; i < whole; i += kThreads * kWidth) {
    function.template update<kWidth>(tensor, i);
  }
  for (std::size_t i = whole + threadIdx.x; i < end; i += kThreads) function.template update<1>(tensor, i);
}

template <typename Function>
__global__ void __launch_bounds__(kThreads)
    over_chunks(const __grid_constant__ Table<Function> table, const __grid_constant__ Function parameters) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.ends[middle] <= blockIdx.x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const typename Function::Tensor tensor = table.tensors[low];
  const std::size_t begin = (blockIdx.x - (low == 0 ? 0u : table.ends[low - 1])) * kChunk;
  const std::size_t end = begin + kChunk < tensor.size ? begin + kChunk : tensor.size;

  Function function = parameters;
  function.prepare();
  constexpr int kWidth = 16 / sizeof(typename Function::Tensor::Element);
  if (tensor.addresses() % 16 == 0) {
    run<kWidth>(function, tensor, begin, end);
  } else {
    run<1>(function, tensor, begin, end);
  }
}

// Runs `function` on every element of `tensors`, on the place's stream. Throws std::runtime_error with CUDA's message
// where it cannot be launched. Each element is computed from its own operands alone, so results do not depend on how
// the work is cut.
template <typename Function>
void launch(const std::vector<typename Function::Tensor>& tensors, const Function& function, CudaPlace place) {
  check(cudaSetDevice(place.device));
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  Table<Function> table;
  table.count = 0;
  std::uint32_t chunks = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    over_chunks<Function><<<chunks, kThreads, 0, stream>>>(table, function);
    check(cudaGetLastError());
    table.count = 0;
    chunks = 0;
  };
  for (const auto& tensor : tensors) {
    if (tensor.size == 0) continue;
    // Above 2^31 chunks there would be more elements than any GPU's memory holds.
    chunks += static_cast<std::uint32_t>((tensor.size + kChunk - 1) / kChunk);
    table.tensors[table.count] = tensor;
    table.ends[table.count] = chunks;
    if (++table.count == Table<Function>::kCapacity) flush();
  }
  flush();
}

}  // namespace fastmoco
