// The transforms of csrc/winograd.h by one instruction set, for its table of tiles (csrc/convolve_tiles.h). Included by
// csrc/convolve_sweep.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.h"

namespace fastmoco {
namespace {

// Numbers of one word vector, as float32: one vector of them, or two where a word holds two.
template <typename Numbers>
struct Wide {
  static constexpr int kParts = static_cast<int>(Numbers::kPacked);
  Vec part[kParts];
};

template <typename Numbers>
FASTMOCO_LOCAL Wide<Numbers> operator+(const Wide<Numbers>& a, const Wide<Numbers>& b) {
  Wide<Numbers> sum;
#pragma GCC unroll 2
  for (int p = 0; p < Wide<Numbers>::kParts; ++p) sum.part[p] = a.part[p] + b.part[p];
  return sum;
}

template <typename Numbers>
FASTMOCO_LOCAL Wide<Numbers> operator-(const Wide<Numbers>& a, const Wide<Numbers>& b) {
  Wide<Numbers> difference;
#pragma GCC unroll 2
  for (int p = 0; p < Wide<Numbers>::kParts; ++p) difference.part[p] = a.part[p] - b.part[p];
  return difference;
}

template <typename Numbers>
FASTMOCO_LOCAL Wide<Numbers> negative(const Wide<Numbers>& a) {
  Wide<Numbers> of;
#pragma GCC unroll 2
  for (int p = 0; p < Wide<Numbers>::kParts; ++p) of.part[p] = -a.part[p];
  return of;
}

template <typename Numbers>
FASTMOCO_LOCAL Wide<Numbers> half(const Wide<Numbers>& a) {
  Wide<Numbers> of;
#pragma GCC unroll 2
  for (int p = 0; p < Wide<Numbers>::kParts; ++p) of.part[p] = a.part[p] * 0.5f;
  return of;
}

// Row `kRow` of B^T d for one column of four places, `line` pointers apart.
template <typename Numbers, int kRow>
FASTMOCO_LOCAL Wide<Numbers> map_row(const std::uint32_t* const* column, std::size_t line, std::size_t at) {
  const auto place = [&](std::size_t row) FASTMOCO_TARGET { return Numbers::widen(column[row * line] + at); };
  if (kRow == 0) return place(0) - place(2);
  if (kRow == 1) return place(1) + place(2);
  if (kRow == 2) return place(2) - place(1);
  return place(1) - place(3);
}

template <typename Numbers, int kRow>
FASTMOCO_LOCAL void spread_row(const std::uint32_t* const* from, std::size_t count, std::size_t at, std::uint32_t* to,
                               std::size_t step, std::size_t stride) {
  const std::size_t line = 2 * count + 2;
  auto a = map_row<Numbers, kRow>(from, line, at), b = map_row<Numbers, kRow>(from + 1, line, at);
  for (std::size_t tile = 0; tile < count; ++tile, to += step) {
    // Half of a tile's places are the next one's too.
    const std::uint32_t* const* const next = from + 2 * tile + 2;
    const auto c = map_row<Numbers, kRow>(next, line, at), d = map_row<Numbers, kRow>(next + 1, line, at);
    Numbers::narrow(a - c, to);
    Numbers::narrow(b + c, to + stride);
    Numbers::narrow(c - b, to + 2 * stride);
    Numbers::narrow(b - d, to + 3 * stride);
    a = c;
    b = d;
  }
}

template <typename Numbers>
FASTMOCO_TARGET void spread(const std::uint32_t* const* from, std::size_t count, std::size_t steps, std::uint32_t* to,
                            std::size_t step, std::size_t stride) {
  for (std::size_t at = 0; at < steps; at += kLanes) {
    spread_row<Numbers, 0>(from, count, at, to + at, step, stride);
    spread_row<Numbers, 1>(from, count, at, to + 4 * stride + at, step, stride);
    spread_row<Numbers, 2>(from, count, at, to + 8 * stride + at, step, stride);
    spread_row<Numbers, 3>(from, count, at, to + 12 * stride + at, step, stride);
  }
}

template <typename Numbers>
FASTMOCO_TARGET void spread_kernel(const std::uint32_t* taps, std::size_t tap, std::size_t steps, std::uint32_t* to) {
  for (std::size_t at = 0; at < steps; at += kLanes) {
    // G g, column by column.
    Wide<Numbers> rows[4][3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      const auto a = Numbers::widen(taps + static_cast<std::size_t>(x) * tap + at);
      const auto b = Numbers::widen(taps + static_cast<std::size_t>(x + 3) * tap + at);
      const auto c = Numbers::widen(taps + static_cast<std::size_t>(x + 6) * tap + at);
      const auto sum = half(a + c), middle = half(b);
      rows[0][x] = a;
      rows[1][x] = sum + middle;
      rows[2][x] = sum - middle;
      rows[3][x] = c;
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      std::uint32_t* const line = to + static_cast<std::size_t>(4 * y) * steps + at;
      const auto sum = half(rows[y][0] + rows[y][2]), middle = half(rows[y][1]);
      Numbers::narrow(rows[y][0], line);
      Numbers::narrow(sum + middle, line + steps);
      Numbers::narrow(sum - middle, line + 2 * steps);
      Numbers::narrow(rows[y][2], line + 3 * steps);
    }
  }
}

template <typename Numbers>
FASTMOCO_TARGET void collect(const float* sums, std::size_t stride, std::uint32_t* const* to) {
  constexpr std::size_t kPairs = 2 * kLanes;
  for (std::size_t at = 0; at < 32; at += kPairs) {
    Vec places[2][4];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const float* const from = sums + at + static_cast<std::size_t>(v) * kLanes;
      Vec rows[2][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const float* const column = from + static_cast<std::size_t>(x) * stride;
        const Vec b = load(column + 4 * stride), c = load(column + 8 * stride);
        rows[0][x] = load(column) + b + c;
        rows[1][x] = b - c - load(column + 12 * stride);
      }
#pragma GCC unroll 2
      for (int y = 0; y < 2; ++y) {
        places[v][2 * y] = rows[y][0] + rows[y][1] + rows[y][2];
        places[v][2 * y + 1] = rows[y][1] - rows[y][2] - rows[y][3];
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      if (to[p] != nullptr) Numbers::store_two(places[0][p], places[1][p], to[p] + at / Numbers::kPacked);
    }
  }
}

// Row `kRow` of A d for one column of two places.
template <typename Numbers, int kRow>
FASTMOCO_LOCAL Wide<Numbers> result_row(const std::uint32_t* const* column, std::size_t at) {
  const auto place = [&](int row) FASTMOCO_TARGET { return Numbers::widen(column[2 * row] + at); };
  if (kRow == 0) return place(0);
  if (kRow == 1) return place(0) + place(1);
  if (kRow == 2) return place(0) - place(1);
  return negative(place(1));
}

// A block of 32 words at each of the four taps of a line.
template <typename Numbers, int kRow, bool kResults>
FASTMOCO_LOCAL void spread_line(const std::uint32_t* const* from, std::size_t at, std::uint32_t* to,
                                std::size_t stride) {
  constexpr int kPacked = static_cast<int>(Numbers::kPacked);
  for (std::size_t v = 0; v < 32 / Numbers::kPacked; v += kLanes) {
    Wide<Numbers> taps[4][kPacked];
#pragma GCC unroll 2
    for (int tile = 0; tile < kPacked; ++tile) {
      if (kResults) {
        const std::uint32_t* const* const places = from + 4 * tile;
        const auto a = result_row<Numbers, kRow>(places, at + v), b = result_row<Numbers, kRow>(places + 1, at + v);
        taps[0][tile] = a;
        taps[1][tile] = a + b;
        taps[2][tile] = a - b;
        taps[3][tile] = negative(b);
      } else {
        const std::uint32_t* const* const places = from + 16 * tile;
        const auto a = map_row<Numbers, kRow>(places, 4, at + v), b = map_row<Numbers, kRow>(places + 1, 4, at + v);
        const auto c = map_row<Numbers, kRow>(places + 2, 4, at + v), d = map_row<Numbers, kRow>(places + 3, 4, at + v);
        taps[0][tile] = a - c;
        taps[1][tile] = b + c;
        taps[2][tile] = c - b;
        taps[3][tile] = b - d;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
#pragma GCC unroll 2
      for (int p = 0; p < kPacked; ++p) {
        Wide<Numbers> tiles;
#pragma GCC unroll 2
        for (int tile = 0; tile < kPacked; ++tile) tiles.part[tile] = taps[t][tile].part[p];
        Numbers::narrow(tiles, to + static_cast<std::size_t>(t) * stride + v + static_cast<std::size_t>(p) * kLanes);
      }
    }
  }
}

template <typename Numbers, bool kResults>
FASTMOCO_TARGET void spread_lines(const std::uint32_t* const* from, std::size_t at, std::size_t line, std::size_t lines,
                                  std::uint32_t* to, std::size_t stride) {
  for (std::size_t end = line + lines; line < end; ++line, to += 4 * stride) {
    switch (line) {
      case 0: spread_line<Numbers, 0, kResults>(from, at, to, stride); break;
      case 1: spread_line<Numbers, 1, kResults>(from, at, to, stride); break;
      case 2: spread_line<Numbers, 2, kResults>(from, at, to, stride); break;
      default: spread_line<Numbers, 3, kResults>(from, at, to, stride);
    }
  }
}

template <typename Numbers>
FASTMOCO_TARGET void collect_kernel(const float* sums, std::size_t stride, std::uint32_t* to, std::size_t tap) {
  constexpr int kPacked = static_cast<int>(Numbers::kPacked);
  for (std::size_t at = 0; at < 32 / Numbers::kPacked; at += kLanes) {
    Wide<Numbers> taps[9];
#pragma GCC unroll 2
    for (int p = 0; p < kPacked; ++p) {
      const float* const from = sums + at + static_cast<std::size_t>(p) * kLanes;
      Vec rows[3][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const float* const column = from + static_cast<std::size_t>(x) * stride;
        const Vec b = load(column + 4 * stride), c = load(column + 8 * stride), sum = (b + c) * 0.5f;
        rows[0][x] = load(column) + sum;
        rows[1][x] = (b - c) * 0.5f;
        rows[2][x] = sum + load(column + 12 * stride);
      }
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) {
        const Vec sum = (rows[y][1] + rows[y][2]) * 0.5f;
        taps[3 * y].part[p] = rows[y][0] + sum;
        taps[3 * y + 1].part[p] = (rows[y][1] - rows[y][2]) * 0.5f;
        taps[3 * y + 2].part[p] = sum + rows[y][3];
      }
    }
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) Numbers::narrow(taps[t], to + static_cast<std::size_t>(t) * tap + at);
  }
}

}  // namespace
}  // namespace fastmoco
