#include "platform.h"

#if defined(FASTMOCO_HAS_AVX512BF16)
#include <immintrin.h>

#include <algorithm>

#include "batch_norm_tiles.h"

#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define FASTMOCO_LANES 16
#include "lanes.h"
// g++ 12 takes the undefined operands of its own AVX-512 headers for uses of uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace fastmoco {
namespace {

FASTMOCO_LOCAL Vec widened(const std::uint16_t* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
FASTMOCO_LOCAL void store_rounded(Vec low, Vec high, std::uint16_t* to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
// `value`, or 0 where `sign` is at or below 0; NaN stays.
FASTMOCO_LOCAL Vec where_positive(Vec sign, Vec value) {
  return _mm512_maskz_mov_ps(_knot_mask16(_mm512_cmp_ps_mask(sign, Vec{}, _CMP_LE_OQ)), value);
}

// What the columns of one vector have.
struct Columns {
  FASTMOCO_LOCAL Columns(const Channels& k, std::size_t c)
      : mean(load(k.mean + c)), scale(load(k.weight + c) * load(k.invstd + c)), bias(load(k.bias + c)) {}

  FASTMOCO_LOCAL Vec normalised(Vec x) const { return fma(x - mean, scale, bias); }

  Vec mean, scale, bias;
};

// Rows of so many columns are too long for the processor to see by itself that eight are read side by side: twice the
// time for maps of 256 channels that are not in the caches.
constexpr std::size_t kLong = 128;

// Calls step.at<number of rows>(first element, first column) for the tile's rows in groups, 32 columns at a time. Long
// rows of the next group are asked for meanwhile, as they lie in memory.
template <typename Step>
FASTMOCO_LOCAL void by_group(const Step& step, const Tile& t) {
  std::size_t row = 0;
  for (; row + kGroup <= t.rows; row += kGroup) {
    std::size_t ahead = row + kGroup;
    for (std::size_t c = 0; c < t.width; c += 32) {
      const std::size_t until = std::min(t.rows, row + kGroup + (c + 32) * kGroup / t.width);
      for (; t.width >= kLong && ahead < until; ++ahead) step.ask(t.offset + ahead * t.stride);
      step.template at<kGroup>(row, c);
    }
  }
  for (; row < t.rows; ++row) {
    for (std::size_t c = 0; c < t.width; c += 32) step.template at<1>(row, c);
  }
}

// Asks for a row of `map` that is wanted soon.
FASTMOCO_LOCAL void ask_for(const std::uint16_t* map, const Tile& t) {
  for (std::size_t c = 0; c < t.width; c += 32) _mm_prefetch(reinterpret_cast<const char*>(map + c), _MM_HINT_T0);
}

struct Statistics {
  template <std::size_t n>
  FASTMOCO_LOCAL void at(std::size_t row, std::size_t column) const {
    const float share = static_cast<float>(n) / static_cast<float>(row + n), between = share * static_cast<float>(row);
    for (std::size_t c = column; c < column + 32; c += kLanes) {
      const std::uint16_t* const from = x + t.offset + row * t.stride + c;
      Vec value[n], sum{}, square{};
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) sum += value[r] = widened(from + r * t.stride);
      const Vec centre = sum * splat(1.0f / n), before = load(mean + c), step = centre - before;
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) square = fma(value[r] - centre, value[r] - centre, square);
      store(mean + c, fma(splat(share), step, before));
      store(squares + c, load(squares + c) + fma(splat(between), step * step, square));
    }
  }

  FASTMOCO_LOCAL void ask(std::size_t first) const { ask_for(x + first, t); }

  const std::uint16_t* x;
  float *mean, *squares;
  const Tile& t;
};

template <bool kResidual, bool kRelu>
struct Apply {
  template <std::size_t n>
  FASTMOCO_LOCAL void at(std::size_t row, std::size_t c) const {
    const Columns low(k, t.column + c), high(k, t.column + c + kLanes);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < n; ++r) {
      const std::size_t i = t.offset + (row + r) * t.stride + c;
      store_rounded(one(low, i), one(high, i + kLanes), y + i);
    }
  }

  FASTMOCO_LOCAL Vec one(const Columns& columns, std::size_t i) const {
    Vec value = columns.normalised(widened(x + i));
    if constexpr (kResidual) value += widened(residual + i);
    return kRelu ? where_positive(value, value) : value;
  }

  FASTMOCO_LOCAL void ask(std::size_t first) const {
    ask_for(x + first, t);
    if constexpr (kResidual) ask_for(residual + first, t);
  }

  const std::uint16_t *x, *residual;
  std::uint16_t* y;
  const Channels& k;
  const Tile& t;
};

// g and x - mean of 16 elements.
struct Gradient {
  Vec g, centred;
};

template <Act kAct>
FASTMOCO_LOCAL Gradient gradient_of(const Behind<std::uint16_t>& from, const Columns& columns, std::size_t i) {
  const Vec dy = widened(from.dy + i), x = widened(from.x + i);
  return {kAct == Act::kRelu ? where_positive(columns.normalised(x), dy) : dy, x - columns.mean};
}

template <Act kAct>
struct Sum {
  template <std::size_t n>
  FASTMOCO_LOCAL void at(std::size_t row, std::size_t c) const {
    const Columns low(k, t.column + c), high(k, t.column + c + kLanes);
    Vec sums[2]{}, alongs[2]{};
#pragma GCC unroll 8
    for (std::size_t r = 0; r < n; ++r) {
      const std::size_t i = t.offset + (row + r) * t.stride + c;
      if constexpr (kAct == Act::kResidualRelu) pass_on(i);
      const Gradient a = gradient(low, i), b = gradient(high, i + kLanes);
      sums[0] += a.g;
      sums[1] += b.g;
      alongs[0] = fma(a.g, a.centred, alongs[0]);
      alongs[1] = fma(b.g, b.centred, alongs[1]);
    }
    for (std::size_t half = 0; half < 2; ++half) {
      const std::size_t to = c + half * kLanes;
      store(sum + to, load(sum + to) + sums[half]);
      store(along + to, load(along + to) + alongs[half]);
    }
  }

  // g, for the residual, as dy has it to the last bit.
  FASTMOCO_LOCAL void pass_on(std::size_t i) const {
    const __m512i y = _mm512_loadu_si512(from.y + i), dy = _mm512_loadu_si512(from.dy + i);
    const __mmask32 positive = _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512());
    _mm512_storeu_si512(dresidual + i, _mm512_maskz_mov_epi16(positive, dy));
  }

  FASTMOCO_LOCAL Gradient gradient(const Columns& columns, std::size_t i) const {
    if constexpr (kAct != Act::kResidualRelu) return gradient_of<kAct>(from, columns, i);
    return gradient_of<Act::kNone>({dresidual, from.x, nullptr}, columns, i);
  }

  FASTMOCO_LOCAL void ask(std::size_t first) const {
    ask_for(from.dy + first, t);
    ask_for(from.x + first, t);
    if constexpr (kAct == Act::kResidualRelu) ask_for(from.y + first, t);
  }

  const Behind<std::uint16_t>& from;
  std::uint16_t* dresidual;
  float *sum, *along;
  const Channels& k;
  const Tile& t;
};

template <Act kAct>
struct Write {
  template <std::size_t n>
  FASTMOCO_LOCAL void at(std::size_t row, std::size_t c) const {
    const std::size_t first = t.column + c, second = first + kLanes;
    const Columns low(k, first), high(k, second);
    const Vec levels[] = {load(level + first), load(level + second)};
    const Vec slopes[] = {load(slope + first), load(slope + second)};
#pragma GCC unroll 8
    for (std::size_t r = 0; r < n; ++r) {
      const std::size_t i = t.offset + (row + r) * t.stride + c;
      const Gradient a = gradient_of<kAct>(from, low, i), b = gradient_of<kAct>(from, high, i + kLanes);
      store_rounded(low.scale * (a.g - fma(a.centred, slopes[0], levels[0])),
                    high.scale * (b.g - fma(b.centred, slopes[1], levels[1])), dx + i);
    }
  }

  FASTMOCO_LOCAL void ask(std::size_t first) const {
    ask_for(from.dy + first, t);
    ask_for(from.x + first, t);
  }

  const Behind<std::uint16_t>& from;
  std::uint16_t* dx;
  const float *level, *slope;
  const Channels& k;
  const Tile& t;
};

FASTMOCO_TARGET void statistics(const std::uint16_t* x, float* mean, float* squares, const Tile& t) {
  std::fill_n(mean, t.width, 0.0f);
  std::fill_n(squares, t.width, 0.0f);
  by_group(Statistics{x, mean, squares, t}, t);
}

FASTMOCO_TARGET void apply(const std::uint16_t* x, const std::uint16_t* residual, std::uint16_t* y, bool relu,
                           const Channels& k, const Tile& t) {
  if (residual == nullptr) {
    relu ? by_group(Apply<false, true>{x, residual, y, k, t}, t)
         : by_group(Apply<false, false>{x, residual, y, k, t}, t);
  } else {
    relu ? by_group(Apply<true, true>{x, residual, y, k, t}, t) : by_group(Apply<true, false>{x, residual, y, k, t}, t);
  }
}

FASTMOCO_TARGET void sum(const Behind<std::uint16_t>& from, std::uint16_t* dresidual, Act act, float* sums,
                         float* along, const Channels& k, const Tile& t) {
  std::fill_n(sums, t.width, 0.0f);
  std::fill_n(along, t.width, 0.0f);
  if (act == Act::kNone) return by_group(Sum<Act::kNone>{from, dresidual, sums, along, k, t}, t);
  if (act == Act::kRelu) return by_group(Sum<Act::kRelu>{from, dresidual, sums, along, k, t}, t);
  by_group(Sum<Act::kResidualRelu>{from, dresidual, sums, along, k, t}, t);
}

FASTMOCO_TARGET void write(const Behind<std::uint16_t>& from, std::uint16_t* dx, Act act, const float* level,
                           const float* slope, const Channels& k, const Tile& t) {
  if (act == Act::kNone) return by_group(Write<Act::kNone>{from, dx, level, slope, k, t}, t);
  by_group(Write<Act::kRelu>{from, dx, level, slope, k, t}, t);
}

}  // namespace

const NormTiles<std::uint16_t> norm_tiles_avx512bf16{statistics, apply, sum, write};

}  // namespace fastmoco
#endif
