// Tiles (csrc/convolve_tiles.h) by one instruction set. Included by such code, in a file that first defines what
// lanes.h wants to be defined, and
//   FASTMOCO_ROWS     rows of a tile: as many as there are registers for, two vectors each
#pragma once

#include <immintrin.h>

#include "convolve.h"
#include "convolve_tiles.h"
#include "lanes.h"
#include "winograd_sweep.h"

namespace fastmoco {
namespace {

constexpr int kRows = FASTMOCO_ROWS;
constexpr std::size_t kBlock = kChannelBlock, kPair = 2 * kLanes;
static_assert(kRows == 4 || kRows == 8, "gather has no tiles of other numbers of rows");

FASTMOCO_LOCAL Vec vector(const std::uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }

// The same word in all lanes.
FASTMOCO_LOCAL Vec word(const std::uint32_t* p) {
  std::int32_t bits;
  std::memcpy(&bits, p, 4);
#if FASTMOCO_LANES == 16
  return (Vec)_mm512_set1_epi32(bits);
#else
  return (Vec)_mm256_set1_epi32(bits);
#endif
}

struct Floats {
  static constexpr std::size_t kPacked = 1;

  FASTMOCO_LOCAL static Wide<Floats> widen(const std::uint32_t* from) { return {{vector(from)}}; }

  FASTMOCO_LOCAL static void narrow(const Wide<Floats>& numbers, std::uint32_t* to) {
    store(reinterpret_cast<float*>(to), numbers.part[0]);
  }

  FASTMOCO_LOCAL static Vec add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

  FASTMOCO_LOCAL static void store_two(Vec low, Vec high, std::uint32_t* to) {
    store(reinterpret_cast<float*>(to), low);
    store(reinterpret_cast<float*>(to) + kLanes, high);
  }

  FASTMOCO_LOCAL static void join_block(const std::uint32_t* first, const std::uint32_t*, std::uint32_t* to) {
    for (std::size_t i = 0; i < kBlock; i += kLanes)
      store(reinterpret_cast<float*>(to + i), first == nullptr ? Vec{} : vector(first + i));
  }
};

template <typename Numbers, bool kSums, int kCount>
FASTMOCO_TARGET void gather_rows(const Row* at, const Tap* taps, std::size_t tap_count, std::size_t steps,
                                 const std::uint32_t* weights) {
  for (std::size_t half = 0; half < kBlock; half += kPair) {
    Vec low[kCount], high[kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) low[r] = high[r] = Vec{};
    for (std::size_t t = 0; t < tap_count; ++t) {
      const std::uint32_t* from[kCount];
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) from[r] = at[r].from + taps[t].shift;
      const std::uint32_t* with = weights + taps[t].weights + half;
      for (std::size_t k = 0; k < steps; ++k, with += kBlock) {
        const Vec left = vector(with), right = vector(with + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
          const Vec number = word(from[r] + k);
          low[r] = Numbers::add(low[r], number, left);
          high[r] = Numbers::add(high[r], number, right);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      if (kSums) {
        Floats::store_two(low[r], high[r], at[r].to + half);
      } else {
        Numbers::store_two(low[r], high[r], at[r].to + half / Numbers::kPacked);
      }
    }
  }
}

template <typename Numbers, bool kSums>
FASTMOCO_TARGET void gather(const Row* at, std::size_t count, const Tap* taps, std::size_t tap_count, std::size_t steps,
                            const std::uint32_t* weights) {
  switch (count) {
#if FASTMOCO_ROWS == 8
    case 8: return gather_rows<Numbers, kSums, 8>(at, taps, tap_count, steps, weights);
    case 7: return gather_rows<Numbers, kSums, 7>(at, taps, tap_count, steps, weights);
    case 6: return gather_rows<Numbers, kSums, 6>(at, taps, tap_count, steps, weights);
    case 5: return gather_rows<Numbers, kSums, 5>(at, taps, tap_count, steps, weights);
#endif
    case 4: return gather_rows<Numbers, kSums, 4>(at, taps, tap_count, steps, weights);
    case 3: return gather_rows<Numbers, kSums, 3>(at, taps, tap_count, steps, weights);
    case 2: return gather_rows<Numbers, kSums, 2>(at, taps, tap_count, steps, weights);
    default: return gather_rows<Numbers, kSums, 1>(at, taps, tap_count, steps, weights);
  }
}

template <typename Numbers>
FASTMOCO_TARGET void reduce(const Run* runs, std::size_t count, std::size_t first, float* sums) {
  for (std::size_t half = 0; half < kBlock; half += kPair) {
    Vec low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) low[r] = high[r] = Vec{};
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t *result = runs[i].result + first, *map = runs[i].map + half;
      for (std::size_t k = 0; k < runs[i].steps; ++k, result += kBlock, map += kBlock) {
        const Vec left = vector(map), right = vector(map + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec number = word(result + r);
          low[r] = Numbers::add(low[r], number, left);
          high[r] = Numbers::add(high[r], number, right);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      // Sums of sums: one of thousands of numbers, one by one, would be less exact.
      float* const to = sums + static_cast<std::size_t>(r) * kBlock + half;
      store(to, load(to) + low[r]);
      store(to + kLanes, load(to + kLanes) + high[r]);
    }
  }
}

template <typename Numbers>
FASTMOCO_TARGET void join(const std::uint32_t* first, const std::uint32_t* second, std::uint32_t* to) {
  Numbers::join_block(first, second, to);
}

template <typename Numbers>
FASTMOCO_TARGET void finish(const float* sums, std::uint32_t* to) {
  for (std::size_t half = 0; half < kBlock; half += kPair)
    Numbers::store_two(load(sums + half), load(sums + half + kLanes), to + half / Numbers::kPacked);
}

// 4 x 4 words: a line of the cache is read and written four words at a time.
FASTMOCO_LOCAL void transpose_four(const std::uint32_t* from, std::size_t stride, std::uint32_t* to) {
  const auto* const rows = reinterpret_cast<const float*>(from);
  const __m128 a = _mm_loadu_ps(rows), b = _mm_loadu_ps(rows + stride);
  const __m128 c = _mm_loadu_ps(rows + 2 * stride), d = _mm_loadu_ps(rows + 3 * stride);
  const __m128 ab = _mm_unpacklo_ps(a, b), cd = _mm_unpacklo_ps(c, d);
  const __m128 ab2 = _mm_unpackhi_ps(a, b), cd2 = _mm_unpackhi_ps(c, d);
  auto* const out = reinterpret_cast<float*>(to);
  _mm_storeu_ps(out, _mm_movelh_ps(ab, cd));
  _mm_storeu_ps(out + kBlock, _mm_movehl_ps(cd, ab));
  _mm_storeu_ps(out + 2 * kBlock, _mm_movelh_ps(ab2, cd2));
  _mm_storeu_ps(out + 3 * kBlock, _mm_movehl_ps(cd2, ab2));
}

FASTMOCO_TARGET void transpose(const std::uint32_t* rows, std::size_t stride, std::size_t steps, std::uint32_t* to) {
  for (std::size_t k = 0; k < steps; k += 4) {
    for (std::size_t r = 0; r < kBlock; r += 4) transpose_four(rows + r * stride + k, stride, to + k * kBlock + r);
  }
}

template <typename Numbers>
constexpr Tiles tiles() {
  return {Numbers::kPacked,
          kRows,
          gather<Numbers, false>,
          gather<Numbers, true>,
          reduce<Numbers>,
          transpose,
          join<Numbers>,
          finish<Numbers>,
          spread<Numbers>,
          spread_kernel<Numbers>,
          collect<Numbers>,
          spread_lines<Numbers, false>,
          spread_lines<Numbers, true>,
          collect_kernel<Numbers>};
}

}  // namespace
}  // namespace fastmoco
