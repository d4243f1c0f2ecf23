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
  // The same, left as 32 sums in float32 at each row.
  void (*gather_sums)(const Row* at, std::size_t count, const Tap* taps, std::size_t tap_count, std::size_t steps,
                      const std::uint32_t* weights);
  // sums (rows, 32) += the products of as many channels of the result, from `first` on, with the map's 32.
  void (*reduce)(const Run* runs, std::size_t count, std::size_t first, float* sums);
  // to (steps, 32) <- 32 rows of `steps` words, a multiple of 4, that lie `stride` apart.
  void (*transpose)(const std::uint32_t* rows, std::size_t stride, std::size_t steps, std::uint32_t* to);
  // A block <- 32 numbers of `first` and, where a word holds two, of `second`; null stands for zeros.
  void (*join)(const std::uint32_t* first, const std::uint32_t* second, std::uint32_t* to);
  // 32 numbers <- as many sums.
  void (*finish)(const float* sums, std::uint32_t* to);

  // Winograd's transforms (csrc/winograd.h), of `steps` words at each place, a multiple of 16.
  // to[i * step + t * stride], of tile i of `count` side by side and of 16 taps t, <- B^T d B, d being 4 x 4 places of
  // the 4 x (2 count + 2) that `from` names.
  void (*spread)(const std::uint32_t* const* from, std::size_t count, std::size_t steps, std::uint32_t* to,
                 std::size_t step, std::size_t stride);
  // to (16, steps) <- G g G^T, g being 3 x 3 taps that lie `tap` apart.
  void (*spread_kernel)(const std::uint32_t* taps, std::size_t tap, std::size_t steps, std::uint32_t* to);
  // 32 numbers at each of 2 x 2 places <- A^T m A, m being 16 times 32 sums, `stride` apart; no place where it is null.
  void (*collect)(const float* sums, std::size_t stride, std::uint32_t* const* to);
  // Lines `line` to `line + lines` of the 4 x 4 taps of B^T d B, d being 4 x 4 places of as many tiles as a word holds
  // numbers, of 32 channels at word `at`: to[t * stride], t being 0 to 4 `lines`, <- 32 words of numbers of all tiles.
  // Where words hold two numbers, the first half of the words are the first channels of the places' words.
  void (*spread_tiles)(const std::uint32_t* const* from, std::size_t at, std::size_t line, std::size_t lines,
                       std::uint32_t* to, std::size_t stride);
  // The same of A d A^T, d being 2 x 2 places.
  void (*spread_results)(const std::uint32_t* const* from, std::size_t at, std::size_t line, std::size_t lines,
                         std::uint32_t* to, std::size_t stride);
  // 9 taps that lie `tap` apart <- G^T u G, u being 16 times 32 sums, `stride` apart, channels as spread_tiles has them.
  void (*collect_kernel)(const float* sums, std::size_t stride, std::uint32_t* to, std::size_t tap);
};

extern const Tiles tiles_avx512bf16, tiles_avx512, tiles_avx2;

// So many bytes of maps or weights stay in a core's second cache beside what they are multiplied with.
constexpr std::size_t kNear = 384 * 1024;
// Parts of the work for each thread: one that is held up leaves the others more of them.
constexpr std::size_t kParts = 8;

// A map, in words.
struct Side {
  std::size_t height, width, words;

  std::size_t at(std::size_t image, std::size_t y, std::size_t x) const {
    return ((image * height + y) * width + x) * words;
  }
};

inline const std::uint32_t* words(const void* map) { return static_cast<const std::uint32_t*>(map); }

struct Convolution;

// Those of the instruction set that a convolution names.
const Tiles& tiles_of(const Convolution& of);

}  // namespace fastmoco
