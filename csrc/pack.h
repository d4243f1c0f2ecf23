// Neighbouring elements moved as one: how a functor reads and writes memory on the CPU and on a GPU alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fastmoco {

// Width 1 is an element, which a CPU's compiler vectorises as it likes; a GPU's thread moves 16 bytes at a time.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T lane[kWidth];
};

// `address` must be aligned to the whole pack.
template <int kWidth, typename T>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE Pack<T, kWidth> load(const T* address) {
  if constexpr (kWidth == 1) {
    return {{*address}};
  } else {
    return *reinterpret_cast<const Pack<T, kWidth>*>(address);
  }
}

template <int kWidth, typename T>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void store(T* address, const Pack<T, kWidth>& pack) {
  if constexpr (kWidth == 1) {
    *address = pack.lane[0];
  } else {
    *reinterpret_cast<Pack<T, kWidth>*>(address) = pack;
  }
}

// The bits of the float16 nearest to x, the even one of two equally near; x is finite and below 65520.
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE std::uint16_t half_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x38800000) {
    // Below 2^-14 float16 is a fixed-point number; so is a float beside 1/2.
    float fixed;
    std::memcpy(&fixed, &magnitude, 4);
    fixed += 0.5f;
    std::memcpy(&bits, &fixed, 4);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<std::uint16_t>(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

// The bits of the bfloat16 nearest to x, the even one of two equally near; NaN stays NaN.
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE std::uint16_t bf16_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7FC0u : rounded);
}

FASTMOCO_HOST_DEVICE FASTMOCO_INLINE float bf16_value(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// The number that is stored as T: as itself, or as the bits of a bfloat16.
FASTMOCO_INLINE float value_of(std::uint16_t bits) { return bf16_value(bits); }
FASTMOCO_INLINE float value_of(float value) { return value; }
FASTMOCO_INLINE double value_of(double value) { return value; }

template <typename T, typename Wide>
FASTMOCO_INLINE T stored(Wide value) {
  if constexpr (sizeof(T) == 2) {
    return bf16_bits(value);
  } else {
    return value;
  }
}

// Elements of T from the bits of as many bfloat16.
template <typename T, int kWidth>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE Pack<T, kWidth> load_bf16(const std::uint16_t* address) {
  const auto narrow = load<kWidth>(address);
  Pack<T, kWidth> pack;
  for (int j = 0; j < kWidth; ++j) pack.lane[j] = static_cast<T>(bf16_value(narrow.lane[j]));
  return pack;
}

template <int kWidth, typename T>
FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void store_bf16(std::uint16_t* address, const Pack<T, kWidth>& pack) {
  Pack<std::uint16_t, kWidth> narrow;
  // float64 goes by way of float32, as torch's own conversion does.
  for (int j = 0; j < kWidth; ++j) narrow.lane[j] = bf16_bits(static_cast<float>(pack.lane[j]));
  store<kWidth>(address, narrow);
}

}  // namespace fastmoco
