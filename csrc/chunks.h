// A list of tensors cut into chunks for the blocks of a GPU: which block works on what. Nothing here needs CUDA, so
// that the CPU's tests can play every block and thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "platform.h"

namespace fastmoco {

// Elements of a chunk: for 256 threads, four packs of 16 bytes of float32 each. A multiple of every pack, so that
// chunks begin aligned where tensors do.
constexpr std::size_t kChunk = 4096;

// Tensors and, for each, the number of chunks up to its end; with the function itself no more than kBytes.
template <typename Function, std::size_t kBytes>
struct Table {
  using Tensor = typename Function::Tensor;
  static constexpr std::size_t kRoom = kBytes - sizeof(Function) - 2 * alignof(Tensor);
  static constexpr int kCapacity = static_cast<int>(kRoom / (sizeof(Tensor) + sizeof(std::uint32_t)));

  Tensor tensors[kCapacity];
  std::uint32_t ends[kCapacity];
  int count;

  FASTMOCO_HOST_DEVICE std::uint32_t chunks() const { return count == 0 ? 0 : ends[count - 1]; }
};

// Calls launch(table) with tables that hold all of `tensors` between them, none of them empty.
template <std::size_t kBytes, typename Function, typename Launch>
void tabulate(const std::vector<typename Function::Tensor>& tensors, const Function&, Launch launch) {
  Table<Function, kBytes> table;
  table.count = 0;
  for (const auto& tensor : tensors) {
    if (tensor.size == 0) continue;
    // Above 2^32 chunks there would be more elements than any GPU's memory holds.
    const std::uint32_t before = table.chunks();
    table.tensors[table.count] = tensor;
    table.ends[table.count++] = before + static_cast<std::uint32_t>((tensor.size + kChunk - 1) / kChunk);
    if (table.count == table.kCapacity) {
      launch(table);
      table.count = 0;
    }
  }
  if (table.count != 0) launch(table);
}

template <int kWidth, typename Function>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void run_packs(const Function& function, const typename Function::Tensor& tensor,
                                                    std::size_t begin, std::size_t end, unsigned thread,
                                                    unsigned threads) {
  const std::size_t whole = begin + (end - begin) / kWidth * kWidth;
  for (std::size_t i = begin + thread * kWidth; i < whole; i += threads * kWidth) {
    function.template update<kWidth>(tensor, i);
  }
  for (std::size_t i = whole + thread; i < end; i += threads) function.template update<1>(tensor, i);
}

// What thread `thread` of `threads` does in block `block`, of which there are as many as the table has chunks.
template <typename Function, std::size_t kBytes>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void run_chunk(const Table<Function, kBytes>& table, Function function,
                                                    std::uint32_t block, unsigned thread, unsigned threads) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.ends[middle] <= block) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const typename Function::Tensor tensor = table.tensors[low];
  const std::size_t begin = (block - (low == 0 ? 0u : table.ends[low - 1])) * kChunk;
  const std::size_t end = begin + kChunk < tensor.size ? begin + kChunk : tensor.size;

  function.prepare();
  constexpr int kWidth = 16 / sizeof(typename Function::Tensor::Element);
  if (tensor.addresses() % 16 == 0) {
    run_packs<kWidth>(function, tensor, begin, end, thread, threads);
  } else {
    run_packs<1>(function, tensor, begin, end, thread, threads);
  }
}

}  // namespace fastmoco
