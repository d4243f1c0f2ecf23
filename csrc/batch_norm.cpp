#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pack.h"
#include "platform.h"

namespace fastmoco {
namespace {

// A tile is what a thread takes at a time. Its size depends on nothing, so that neither do the sums.
constexpr std::size_t kRows = 256, kColumns = 256;

// Rows of a tile that are taken at once: read once, each column's values stay in registers.
constexpr std::size_t kGroup = 8;

// Below this a second thread costs more to wake than it saves (elements).
constexpr std::size_t kGrain = 32768;

// A tile's first element, its first column, and its size; `stride` is how far apart rows are.
struct Tile {
  std::size_t offset, column, rows, width, stride;
};

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

// Mean and sum of squared deviations of each column. Each group's own are merged into those of the rows before it
// (Chan, Golub and LeVeque 1983): nothing cancels, however large the mean.
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

// Where g, the gradient behind act, comes from.
template <typename T>
struct Behind {
  const T *dy, *x, *y;
};
enum class Act { kNone, kRelu, kResidualRelu };

// g, as it is stored.
template <Act kAct, typename T>
FASTMOCO_INLINE T behind(const Behind<T>& from, std::size_t i, float centred, float scale, float bias) {
  const T dy = from.dy[i];
  if constexpr (kAct == Act::kNone) return dy;
  if constexpr (kAct == Act::kResidualRelu) return where_positive(from.y[i], dy);
  // The very arithmetic of the forward.
  return centred * scale + bias <= 0 ? T{0} : dy;
}

// Sums of g and of g * (x - mean) over the tile's rows; g is written where the residual takes it.
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

// dx = weight invstd (g - mean of g - (x - mean) invstd^2 mean of g (x - mean)); `level` and `slope` are those means,
// the second with its factor.
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

// Functions by name, since a template cannot be cloned.
#define NORM_OF(clones, T)                                                                                          \
  clones void statistics(const T* x, float* mean, float* squares, const Tile& t) {                                  \
    find_statistics(x, mean, squares, t);                                                                           \
  }                                                                                                                 \
  NORM_APPLY(clones, T, apply_plain, false, false)                                                                  \
  NORM_APPLY(clones, T, apply_relu, false, true)                                                                    \
  NORM_APPLY(clones, T, apply_residual, true, false)                                                                \
  NORM_APPLY(clones, T, apply_residual_relu, true, true)                                                            \
  NORM_SUM(clones, T, sum_plain, Act::kNone)                                                                        \
  NORM_SUM(clones, T, sum_relu, Act::kRelu)                                                                         \
  NORM_SUM(clones, T, sum_residual_relu, Act::kResidualRelu)                                                        \
  NORM_WRITE(clones, T, write_plain, Act::kNone)                                                                    \
  NORM_WRITE(clones, T, write_relu, Act::kRelu)
#define NORM_APPLY(clones, T, name, kResidual, kRelu)                                                               \
  clones void name(const T* x, const T* residual, T* y, const Channels& k, const Tile& t) {                         \
    apply<kResidual, kRelu>(x, residual, y, k, t);                                                                  \
  }
#define NORM_SUM(clones, T, name, kAct)                                                                             \
  clones void name(const Behind<T>& from, T* dresidual, float* sum, float* along, const Channels& k,                \
                   const Tile& t) {                                                                                 \
    sum_gradient<kAct>(from, dresidual, sum, along, k, t);                                                          \
  }
#define NORM_WRITE(clones, T, name, kAct)                                                                           \
  clones void name(const Behind<T>& from, T* dx, const float* level, const float* slope, const Channels& k,         \
                   const Tile& t) {                                                                                 \
    write_gradient<kAct>(from, dx, level, slope, k, t);                                                             \
  }
NORM_OF(FASTMOCO_CLONES_16, std::uint16_t)
NORM_OF(FASTMOCO_CLONES, float)
#undef NORM_OF
#undef NORM_APPLY
#undef NORM_SUM
#undef NORM_WRITE

// Two passes over the tiles of a map, between which each channel's two numbers of every tile become one.
// first(tile, numbers, numbers), merge(channel, rows of a tile's numbers), second(tile). The second pass takes tiles
// in the order of the first and by the same threads, so that a map as large as the caches is still there.
template <typename First, typename Merge, typename Second>
void two_passes(const Pixels& map, const First& first, const Merge& merge, const Second& second) {
  const std::size_t down = (map.rows + kRows - 1) / kRows, across = (map.channels + kColumns - 1) / kColumns;
  const std::size_t tiles = down * across;
  std::vector<float> numbers(2 * down * map.channels);
  float* const low = numbers.data();
  float* const high = low + down * map.channels;
  const auto tile = [&](std::size_t i) {
    const std::size_t row = i / across * kRows, column = i % across * kColumns;
    return Tile{row * map.channels + column, column, std::min(kRows, map.rows - row),
                std::min(kColumns, map.channels - column), map.channels};
  };
  const auto place = [&](std::size_t i) { return i / across * map.channels + i % across * kColumns; };
  const std::size_t useful = std::min(tiles, (map.rows * map.channels + kGrain - 1) / kGrain);
  [[maybe_unused]] const int team = static_cast<int>(std::min(useful, static_cast<std::size_t>(map.threads)));
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < tiles; ++i) first(tile(i), low + place(i), high + place(i));
#pragma omp for schedule(static)
    for (std::size_t c = 0; c < map.channels; ++c) merge(c, low + c, high + c, down);
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < tiles; ++i) second(tile(i));
  }
}

}  // namespace

template <typename T>
void batch_norm_forward(const T* x, const T* residual, T* y, const Channels& k, float* unbiased, double epsilon,
                        bool relu, const Pixels& map) {
  const auto statistics_of = [&](const Tile& t, float* mean, float* squares) { statistics(x, mean, squares, t); };
  const auto merge = [&](std::size_t c, const float* means, const float* squares, std::size_t down) {
    double mean = 0, square = 0;
    for (std::size_t i = 0; i < down; ++i) {
      const std::size_t before = i * kRows, after = std::min(before + kRows, map.rows);
      const double share = static_cast<double>(after - before) / static_cast<double>(after);
      const double step = means[i * map.channels] - mean;
      mean += share * step;
      square += squares[i * map.channels] + share * static_cast<double>(before) * (step * step);
    }
    const auto n = static_cast<double>(map.rows);
    k.mean[c] = static_cast<float>(mean);
    k.invstd[c] = static_cast<float>(1 / std::sqrt(square / n + epsilon));
    unbiased[c] = static_cast<float>(square / (n - 1));
  };
  const auto apply_to = [&](const Tile& t) {
    if (residual == nullptr) {
      relu ? apply_relu(x, residual, y, k, t) : apply_plain(x, residual, y, k, t);
    } else {
      relu ? apply_residual_relu(x, residual, y, k, t) : apply_residual(x, residual, y, k, t);
    }
  };
  two_passes(map, statistics_of, merge, apply_to);
}

template <typename T>
void batch_norm_backward(const T* dy, const T* x, const T* y, T* dx, T* dresidual, const Channels& k, float* dweight,
                         float* dbias, bool relu, const Pixels& map) {
  std::vector<float> means(2 * map.channels);
  float* const level = means.data();
  float* const slope = level + map.channels;
  const bool written = dresidual != nullptr;
  const auto sums_of = [&](const Tile& t, float* sum, float* along) {
    const Behind<T> from{dy, x, y};
    if (written) {
      sum_residual_relu(from, dresidual, sum, along, k, t);
    } else {
      relu ? sum_relu(from, dresidual, sum, along, k, t) : sum_plain(from, dresidual, sum, along, k, t);
    }
  };
  const auto merge = [&](std::size_t c, const float* sums, const float* alongs, std::size_t down) {
    double sum = 0, along = 0;
    for (std::size_t i = 0; i < down; ++i) {
      sum += sums[i * map.channels];
      along += alongs[i * map.channels];
    }
    const auto n = static_cast<double>(map.rows);
    const double invstd = k.invstd[c];
    dbias[c] = static_cast<float>(sum);
    dweight[c] = static_cast<float>(along * invstd);
    level[c] = static_cast<float>(sum / n);
    slope[c] = static_cast<float>(along / n * invstd * invstd);
  };
  const auto write = [&](const Tile& t) {
    // g is in `dresidual` already, where it is written.
    const Behind<T> from{written ? dresidual : dy, x, nullptr};
    relu && !written ? write_relu(from, dx, level, slope, k, t) : write_plain(from, dx, level, slope, k, t);
  };
  two_passes(map, sums_of, merge, write);
}

template void batch_norm_forward(const std::uint16_t*, const std::uint16_t*, std::uint16_t*, const Channels&, float*,
                                 double, bool, const Pixels&);
template void batch_norm_forward(const float*, const float*, float*, const Channels&, float*, double, bool,
                                 const Pixels&);
template void batch_norm_backward(const std::uint16_t*, const std::uint16_t*, const std::uint16_t*, std::uint16_t*,
                                  std::uint16_t*, const Channels&, float*, float*, bool, const Pixels&);
template void batch_norm_backward(const float*, const float*, const float*, float*, float*, const Channels&, float*,
                                  float*, bool, const Pixels&);

}  // namespace fastmoco
