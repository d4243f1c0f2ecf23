// What csrc/batch_norm.h does to one tile of a map, in the generic form and by instruction sets of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "batch_norm.h"

namespace fastmoco {

// A tile's first element, its first column, and its size; `stride` is how far apart rows are.
struct Tile {
  std::size_t offset, column, rows, width, stride;
};

// Rows of a tile that are taken at once: read once, each column's values stay in registers.
constexpr std::size_t kGroup = 8;

// Where g, the gradient behind act, comes from.
template <typename T>
struct Behind {
  const T *dy, *x, *y;
};
enum class Act { kNone, kRelu, kResidualRelu };

template <typename T>
struct NormTiles {
  // Mean and sum of squared deviations of each column. Each group's own are merged into those of the rows before it
  // (Chan, Golub and LeVeque 1983): nothing cancels, however large the mean.
  void (*statistics)(const T* x, float* mean, float* squares, const Tile& tile);
  void (*apply)(const T* x, const T* residual, T* y, bool relu, const Channels& channel, const Tile& tile);
  // Sums of g and of g * (x - mean) over the tile's rows; g is written where the residual takes it.
  void (*sum)(const Behind<T>& from, T* dresidual, Act act, float* sum, float* along, const Channels& channel,
              const Tile& tile);
  // dx = weight invstd (g - mean of g - (x - mean) invstd^2 mean of g (x - mean)); `level` and `slope` are those means,
  // the second with its factor. `act` is kNone or kRelu.
  void (*write)(const Behind<T>& from, T* dx, Act act, const float* level, const float* slope, const Channels& channel,
                const Tile& tile);
};

// Those for a map of so many channels, by the best instructions that the processor has for it.
template <typename T>
const NormTiles<T>& norm_tiles(std::size_t channels);

// By AVX512-BF16, for tiles whose width is a multiple of 32.
extern const NormTiles<std::uint16_t> norm_tiles_avx512bf16;

}  // namespace fastmoco
