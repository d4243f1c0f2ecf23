#include "batch_norm_tiles.h"

#include <algorithm>
#include <type_traits>

#include "pack.h"
#include "platform.h"

namespace fastmoco {
namespace {

// Masks in place of branches, which would keep the compiler from using vectors. NaN, which bf16_bits makes positive,
// passes, as with torch's ReLU.
FASTMOCO_INLINE std::uint16_t where_positive(std::uint16_t sign, std::uint16_t bits) {
  return bits & static_cast<std::uint16_t>(-(static_cast<std::int16_t>(sign) > 0));
}
FASTMOCO_INLINE float where_positive(float sign, float value) { return sign <= 0 ? 0.0f : value; }

// Calls run(constant number of rows, first row) until all rows of the tile have been taken.
template <typename Run>
FASTMOCO_INLINE void by_group(const Tile& t, const Run& run) {
  std::size_t row = 0;
  for (; row + kGroup <= t.rows; row += kGroup) run(std::integral_constant<std::size_t, kGroup>{}, row);
  for (; row < t.rows; ++row) run(std::integral_constant<std::size_t, 1>{}, row);
}

template <typename T>
FASTMOCO_INLINE void find_statistics(const T* from, float* __restrict mean, float* __restrict squares, const Tile& t) {
  std::fill_n(mean, t.width, 0.0f);
  std::fill_n(squares, t.width, 0.0f);
  by_group(t, [&](auto size, std::size_t row) {
    constexpr std::size_t n = size;
    const T* __restrict x = from + t.offset + row * t.stride;
    const float share = static_cast<float>(n) / static_cast<float>(row + n), between = share * static_cast<float>(row);
#pragma GCC ivdep
    for (std::size_t c = 0; c < t.width; ++c) {
      float value[n], sum = 0, square = 0;
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) sum += value[r] = value_of(x[r * t.stride + c]);
      const float centre = sum * (1.0f / n), step = centre - mean[c];
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) square += (value[r] - centre) * (value[r] - centre);
      mean[c] += share * step;
      squares[c] += square + between * (step * step);
    }
  });
}

template <bool kResidual, bool kRelu, typename T>
FASTMOCO_INLINE void apply(const T* from, const T* plus, T* to, const Channels& k, const Tile& t) {
  const float *weight = k.weight + t.column, *bias = k.bias + t.column, *mean = k.mean + t.column;
  const float* invstd = k.invstd + t.column;
  by_group(t, [&](auto size, std::size_t row) {
    constexpr std::size_t n = size;
    const std::size_t first = t.offset + row * t.stride;
    const T* x = from + first;
    const T* residual = kResidual ? plus + first : nullptr;
    T* y = to + first;
#pragma GCC ivdep
    for (std::size_t c = 0; c < t.width; ++c) {
      const float scale = weight[c] * invstd[c];
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) {
        const std::size_t i = r * t.stride + c;
        float value = (value_of(x[i]) - mean[c]) * scale + bias[c];
        if constexpr (kResidual) value += value_of(residual[i]);
        const T rounded = stored<T>(value);
        y[i] = kRelu ? where_positive(rounded, rounded) : rounded;
      }
    }
  });
}

// g, as it is stored.
template <Act kAct, typename T>
FASTMOCO_INLINE T behind(const Behind<T>& from, std::size_t i, float centred, float scale, float bias) {
  const T dy = from.dy[i];
  if constexpr (kAct == Act::kNone) return dy;
  if constexpr (kAct == Act::kResidualRelu) return where_positive(from.y[i], dy);
  // The very arithmetic of the forward.
  return centred * scale + bias <= 0 ? T{0} : dy;
}

template <Act kAct, typename T>
FASTMOCO_INLINE void sum_gradient(const Behind<T>& from, T* dresidual, float* __restrict sum, float* __restrict along,
                                  const Channels& k, const Tile& t) {
  const float *weight = k.weight + t.column, *bias = k.bias + t.column, *mean = k.mean + t.column;
  const float* invstd = k.invstd + t.column;
  std::fill_n(sum, t.width, 0.0f);
  std::fill_n(along, t.width, 0.0f);
  by_group(t, [&](auto size, std::size_t row) {
    constexpr std::size_t n = size;
    const std::size_t first = t.offset + row * t.stride;
#pragma GCC ivdep
    for (std::size_t c = 0; c < t.width; ++c) {
      const float scale = weight[c] * invstd[c];
      float part = 0, part_along = 0;
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) {
        const std::size_t i = first + r * t.stride + c;
        const float centred = value_of(from.x[i]) - mean[c];
        const T passed = behind<kAct>(from, i, centred, scale, bias[c]);
        const float g = value_of(passed);
        if constexpr (kAct == Act::kResidualRelu) dresidual[i] = passed;
        part += g;
        part_along += g * centred;
      }
      sum[c] += part;
      along[c] += part_along;
    }
  });
}

template <Act kAct, typename T>
FASTMOCO_INLINE void write_gradient(const Behind<T>& from, T* dx, const float* level, const float* slope,
                                    const Channels& k, const Tile& t) {
  const float *weight = k.weight + t.column, *bias = k.bias + t.column, *mean = k.mean + t.column;
  const float* invstd = k.invstd + t.column;
  level += t.column;
  slope += t.column;
  by_group(t, [&](auto size, std::size_t row) {
    constexpr std::size_t n = size;
    const std::size_t first = t.offset + row * t.stride;
#pragma GCC ivdep
    for (std::size_t c = 0; c < t.width; ++c) {
      const float scale = weight[c] * invstd[c];
#pragma GCC unroll 8
      for (std::size_t r = 0; r < n; ++r) {
        const std::size_t i = first + r * t.stride + c;
        const float centred = value_of(from.x[i]) - mean[c];
        const float g = value_of(behind<kAct>(from, i, centred, scale, bias[c]));
        dx[i] = stored<T>(scale * (g - level[c] - centred * slope[c]));
      }
    }
  });
}

// Functions by name, since a template cannot be cloned. Each has its variants side by side: branches outside of loops.
#define NORM_OF(clones, T)                                                                                          \
  clones void statistics(const T* x, float* mean, float* squares, const Tile& t) {                                  \
    find_statistics(x, mean, squares, t);                                                                           \
  }                                                                                                                 \
  clones void apply_to(const T* x, const T* residual, T* y, bool relu, const Channels& k, const Tile& t) {          \
    if (residual == nullptr) {                                                                                      \
      relu ? apply<false, true>(x, residual, y, k, t) : apply<false, false>(x, residual, y, k, t);                  \
    } else {                                                                                                        \
      relu ? apply<true, true>(x, residual, y, k, t) : apply<true, false>(x, residual, y, k, t);                    \
    }                                                                                                               \
  }                                                                                                                 \
  clones void sum_of(const Behind<T>& from, T* dresidual, Act act, float* sum, float* along, const Channels& k,     \
                     const Tile& t) {                                                                               \
    if (act == Act::kNone) return sum_gradient<Act::kNone>(from, dresidual, sum, along, k, t);                      \
    if (act == Act::kRelu) return sum_gradient<Act::kRelu>(from, dresidual, sum, along, k, t);                      \
    sum_gradient<Act::kResidualRelu>(from, dresidual, sum, along, k, t);                                            \
  }                                                                                                                 \
  clones void write_to(const Behind<T>& from, T* dx, Act act, const float* level, const float* slope,               \
                       const Channels& k, const Tile& t) {                                                          \
    if (act == Act::kNone) return write_gradient<Act::kNone>(from, dx, level, slope, k, t);                         \
    write_gradient<Act::kRelu>(from, dx, level, slope, k, t);                                                       \
  }
NORM_OF(FASTMOCO_CLONES_16, std::uint16_t)
NORM_OF(FASTMOCO_CLONES, float)
#undef NORM_OF

template <typename T>
const NormTiles<T> kGeneric{statistics, apply_to, sum_of, write_to};

}  // namespace

template <>
const NormTiles<float>& norm_tiles(std::size_t) {
  return kGeneric<float>;
}

template <>
const NormTiles<std::uint16_t>& norm_tiles([[maybe_unused]] std::size_t channels) {
#if defined(FASTMOCO_HAS_AVX512BF16)
  if (channels % 32 == 0 && has_avx512bf16()) return norm_tiles_avx512bf16;
#endif
  return kGeneric<std::uint16_t>;
}

}  // namespace fastmoco
