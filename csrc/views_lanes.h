// What views need of vectors beyond lanes.h: widening pixels, transposing, rounding to float16.
#pragma once

#include <cstring>

#include "lanes.h"
#include "pack.h"

namespace fastmoco {
namespace {

// Vec without its permission to be unaligned, which templates would not keep.
typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Whole __attribute__((vector_size(kLanes * 4)));

FASTMOCO_LOCAL Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
FASTMOCO_LOCAL Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// kLanes pixels' values as floats.
FASTMOCO_LOCAL Vec widen(const std::uint8_t* p) {
#if FASTMOCO_LANES == 16
  // Masked by ones, as g++ 12 warns of its own header otherwise.
  const __m512i whole = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(reinterpret_cast<Whole>(whole), Lanes);
#elif FASTMOCO_LANES == 8
  const __m256i whole = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(reinterpret_cast<Whole>(whole), Lanes);
#else
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
#endif
}

FASTMOCO_LOCAL Vec widen(const std::uint16_t* p) {
#if FASTMOCO_LANES == 16
  const __m512i whole = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return __builtin_convertvector(reinterpret_cast<Whole>(whole), Lanes);
#elif FASTMOCO_LANES == 8
  const __m256i whole = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(reinterpret_cast<Whole>(whole), Lanes);
#else
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
#endif
}

// x / white to the last bit, white being a whole number: `reciprocal` is 1 / white, rounded.
FASTMOCO_LOCAL Vec divided(Vec x, float white, float reciprocal) {
#if FASTMOCO_LANES == 4
  (void)reciprocal;
  return x / white;
#else
  const Vec quotient = x * reciprocal;
  return fma(fma(quotient, splat(-white), x), splat(reciprocal), quotient);
#endif
}

#if FASTMOCO_LANES == 16
// Exchanges lanes of two rows that lie kStep apart: one step of a transposition.
template <int kStep>
FASTMOCO_LOCAL void exchange(Vec& a, Vec& b) {
  Whole low{}, high{};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & kStep ? kLanes + i - kStep : i;
    high[i] = i & kStep ? kLanes + i : i + kStep;
  }
  const Vec x = a, y = b;
  a = _mm512_permutex2var_ps(x, reinterpret_cast<__m512i>(low), y);
  b = _mm512_permutex2var_ps(x, reinterpret_cast<__m512i>(high), y);
}

template <int kStep>
FASTMOCO_LOCAL void exchange_all(Vec (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(v[i], v[i + kStep]);
}
#endif

// Rows become columns.
FASTMOCO_LOCAL void transpose(Vec (&v)[kLanes]) {
#if FASTMOCO_LANES == 16
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
#elif FASTMOCO_LANES == 8
  Vec w[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    w[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Vec a = _mm256_unpacklo_ps(w[i], w[i + 1]), b = _mm256_unpackhi_ps(w[i], w[i + 1]);
    const Vec c = _mm256_unpacklo_ps(w[i + 2], w[i + 3]), d = _mm256_unpackhi_ps(w[i + 2], w[i + 3]);
    v[i] = _mm256_shuffle_ps(a, c, 0x44);
    v[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    v[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    v[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
#endif
}

FASTMOCO_LOCAL void store_half(std::uint16_t* p, Vec v) {
#if FASTMOCO_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTMOCO_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = half_bits(v[i]);
#endif
}

// A pixel: red, green, blue and nothing.
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

FASTMOCO_LOCAL Quad load_quad(const float* p) { return *reinterpret_cast<const Quad*>(p); }
FASTMOCO_LOCAL void store_quad(float* p, Quad v) { *reinterpret_cast<Quad*>(p) = v; }

// The first kCount values of a pixel as float16.
template <std::size_t kCount>
FASTMOCO_LOCAL void store_half(std::uint16_t* p, Quad v) {
#if FASTMOCO_LANES > 4
  const std::int64_t half = _mm_cvtsi128_si64(_mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint16_t half[4] = {half_bits(v[0]), half_bits(v[1]), half_bits(v[2]), half_bits(v[3])};
#endif
  std::memcpy(p, &half, 2 * kCount);
}

}  // namespace
}  // namespace fastmoco
