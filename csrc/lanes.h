// Vectors of floats for code that is compiled once per instruction set. Included by such code, in a file that first
// defines
//   FASTMOCO_TARGET   the attribute that selects the instruction set, which every function must have
//   FASTMOCO_LANES    floats in a vector register: 16 (AVX-512), 8 (AVX2 and FMA) or 4 (any processor)
// and includes <immintrin.h> where it has more than 4 of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fastmoco {
namespace {

constexpr int kLanes = FASTMOCO_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
// Bits of numbers that are read as float elsewhere.
typedef std::uint32_t Word __attribute__((may_alias));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

#define FASTMOCO_LOCAL FASTMOCO_TARGET FASTMOCO_INLINE

FASTMOCO_LOCAL Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
FASTMOCO_LOCAL void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

// Subtracting zero changes no number, which the compiler knows; adding it would change -0.
FASTMOCO_LOCAL Vec splat(float x) { return x - Vec{}; }

// The compiler may not contract products and sums by itself (see setup.py).
FASTMOCO_LOCAL Vec fma(Vec a, Vec b, Vec c) {
#if FASTMOCO_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif FASTMOCO_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// `size` floats from as many bfloat16.
FASTMOCO_LOCAL void widen_bfloat16(const std::uint16_t* from, float* to, std::size_t size) {
  auto* const bits = reinterpret_cast<Word*>(to);
  for (std::size_t i = 0; i < size; ++i) bits[i] = static_cast<std::uint32_t>(from[i]) << 16;
}

// `size` floats from as many float16.
FASTMOCO_LOCAL void widen_float16(const std::uint16_t* from, float* to, std::size_t size) {
  auto* const bits = reinterpret_cast<Word*>(to);
  for (std::size_t i = 0; i < size; ++i) {
    // Exponent and mantissa in float32's places are the number times 2^-112, subnormal or not.
    const std::uint32_t magnitude = static_cast<std::uint32_t>(from[i] & 0x7fff) << 13;
    const std::uint32_t sign = static_cast<std::uint32_t>(from[i] & 0x8000) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::uint32_t scaled;
    std::memcpy(&scaled, &value, 4);
    if ((from[i] & 0x7c00) == 0x7c00) scaled = magnitude | 0x7f800000;
    bits[i] = scaled | sign;
  }
}

}  // namespace
}  // namespace fastmoco
