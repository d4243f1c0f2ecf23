// The innermost loops of csrc/convolve.h, once per instruction set: tiles of sums that stay in registers.
//
// Everything is counted in words of 32 bits, which hold one float32 or two bfloat16, the earlier in the lower half. A
// block is 32 words of as many channels, side by side.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmoco {

// What one tap of a kernel adds: words at `shift` from a row's beginning, times those at `weights` in a block's.
struct Tap {
  std::ptrdiff_t shift;
  std::size_t weights;
};

// A place of the map that is read, and of the one that is written.
struct Row {
  const std::uint32_t* from;
  std::uint32_t* to;
};

// Words, in blocks, that one place or several in a line add to a gradient of weights.
struct Run {
  const std::uint32_t* result;
  const std::uint32_t* map;
  std::size_t steps;
};

struct Tiles {
  std::size_t packed;  // numbers in a word
  std::size_t rows;    // of a tile: a divisor of 32

  // The 32 channels at each of `count` rows, at most `rows`, <- the sums over all taps of `steps` words each, times
  // their weights (steps, 32).
  void (*gather)(const Row* at, std::size_t count, const Tap* taps, std::size_t tap_count, std::size_t steps,
                 const std::uint32_t* weights);
  // sums (rows, 32) += the products of as many channels of the result, from `first` on, with the map's 32.
  void (*reduce)(const Run* runs, std::size_t count, std::size_t first, float* sums);
  // to (steps, 32) <- 32 rows of `steps` words, a multiple of 4, that lie `stride` apart.
  void (*transpose)(const std::uint32_t* rows, std::size_t stride, std::size_t steps, std::uint32_t* to);
  // A block <- 32 numbers of `first` and, where a word holds two, of `second`; null stands for zeros.
  void (*join)(const std::uint32_t* first, const std::uint32_t* second, std::uint32_t* to);
  // 32 numbers <- as many sums.
  void (*finish)(const float* sums, std::uint32_t* to);
};

extern const Tiles tiles_avx512bf16, tiles_avx512, tiles_avx2;

struct Convolution;

// Those of the instruction set that a convolution names.
const Tiles& tiles_of(const Convolution& of);

}  // namespace fastmoco
