#include "pooled_mse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "pack.h"

namespace fastmoco {
namespace {

template <typename To, typename From>
FASTMOCO_INLINE To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FASTMOCO_INLINE float load(float x) { return x; }

FASTMOCO_INLINE float load(BFloat16 x) { return bf16_value(x.bits); }

FASTMOCO_INLINE float load(Half x) {
  const std::uint32_t bits = x.bits;
  // The exponents' biases differ by 112; the product makes subnormal numbers normal on the way.
  const float magnitude = bits_as<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  const std::uint32_t infinite = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
  return bits_as<float>(bits_as<std::uint32_t>(magnitude) | infinite | (bits & 0x8000u) << 16);
}

FASTMOCO_INLINE void store(float x, float* to) { *to = x; }

FASTMOCO_INLINE void store(float x, BFloat16* to) { to->bits = bf16_bits(x); }

FASTMOCO_INLINE void store(float x, Half* to) {
  const auto bits = bits_as<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves in the low bits what a number below 2^-14 is in units of 2^-24, rounded by the addition.
  const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const std::uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to->bits = static_cast<std::uint16_t>((magnitude >= 0x477ff000u ? infinite : finite) | (bits >> 16 & 0x8000u));
}

struct Range {
  std::size_t begin, end;
  FASTMOCO_INLINE std::size_t size() const { return end - begin; }
};

// The pixels of `side` that cell i of `grid` covers, as torch's adaptive pooling defines them; and, the two sides
// exchanged, the cells that pixel i lies in.
FASTMOCO_INLINE Range window(std::size_t i, std::size_t side, std::size_t grid) {
  return {i * side / grid, ((i + 1) * side + grid - 1) / grid};
}

// One row of cells, of one image: the rows of pixels are summed first, then the columns of the sum, `row`.
template <typename T>
FASTMOCO_INLINE double forward_row(const T* __restrict a, const T* __restrict b, const float* __restrict pooled,
                                   float* __restrict difference, float* __restrict row, std::size_t i,
                                   const Maps& m) {
  const std::size_t size = m.width * m.channels;
  const Range rows = window(i, m.height, m.grid);
  for (std::size_t y = rows.begin; y < rows.end; ++y) {
    const T* __restrict from = a + y * size;
    const T* __restrict minus = b == nullptr ? nullptr : b + y * size;
    if (minus != nullptr && y == rows.begin) {
      for (std::size_t e = 0; e < size; ++e) row[e] = load(from[e]) - load(minus[e]);
    } else if (minus != nullptr) {
      for (std::size_t e = 0; e < size; ++e) row[e] += load(from[e]) - load(minus[e]);
    } else if (y == rows.begin) {
      for (std::size_t e = 0; e < size; ++e) row[e] = load(from[e]);
    } else {
      for (std::size_t e = 0; e < size; ++e) row[e] += load(from[e]);
    }
  }
  double squares = 0;
  for (std::size_t j = 0; j < m.grid; ++j) {
    const Range columns = window(j, m.width, m.grid);
    const float share = 1.0f / static_cast<float>(rows.size() * columns.size());
    float* __restrict cell = difference + j * m.channels;
    const float* first = row + columns.begin * m.channels;
    for (std::size_t c = 0; c < m.channels; ++c) cell[c] = first[c];
    for (std::size_t x = 1; x < columns.size(); ++x) {
      const float* next = first + x * m.channels;
      for (std::size_t c = 0; c < m.channels; ++c) cell[c] += next[c];
    }
    for (std::size_t c = 0; c < m.channels; ++c) cell[c] *= share;
    if (pooled != nullptr) {
      const float* other = pooled + j * m.channels;
      for (std::size_t c = 0; c < m.channels; ++c) cell[c] -= other[c];
    }
#pragma omp simd reduction(+ : squares)
    for (std::size_t c = 0; c < m.channels; ++c) squares += static_cast<double>(cell[c]) * cell[c];
  }
  return squares;
}

// One row of pixels, of one image: `row` gathers the rows of cells that it lies in, each pixel then the columns.
template <typename T>
FASTMOCO_INLINE void backward_row(const float* __restrict difference, float scale, T* __restrict da,
                                  float* __restrict row, std::size_t y, const Maps& m) {
  const Range cells = window(y, m.grid, m.height);
  for (std::size_t i = cells.begin; i < cells.end; ++i) {
    const std::size_t height = window(i, m.height, m.grid).size();
    for (std::size_t j = 0; j < m.grid; ++j) {
      const float share = scale / static_cast<float>(height * window(j, m.width, m.grid).size());
      const float* from = difference + (i * m.grid + j) * m.channels;
      float* __restrict to = row + j * m.channels;
      if (i == cells.begin) {
        for (std::size_t c = 0; c < m.channels; ++c) to[c] = share * from[c];
      } else {
        for (std::size_t c = 0; c < m.channels; ++c) to[c] += share * from[c];
      }
    }
  }
  for (std::size_t x = 0; x < m.width; ++x) {
    const Range columns = window(x, m.grid, m.width);
    T* __restrict pixel = da + x * m.channels;
    const float* first = row + columns.begin * m.channels;
    if (columns.size() == 1) {
      for (std::size_t c = 0; c < m.channels; ++c) store(first[c], pixel + c);
    } else if (columns.size() == 2) {
      const float* second = first + m.channels;
      for (std::size_t c = 0; c < m.channels; ++c) store(first[c] + second[c], pixel + c);
    } else {
      for (std::size_t c = 0; c < m.channels; ++c) {
        float sum = first[c];
        for (std::size_t j = 1; j < columns.size(); ++j) sum += first[j * m.channels + c];
        store(sum, pixel + c);
      }
    }
  }
}

// The instruction set is chosen once a row. Overloads, since a template cannot be cloned.
#define FASTMOCO_POOLED_MSE_ROWS(T)                                                                               \
  FASTMOCO_CLONES double forward_row_of(const T* a, const T* b, const float* pooled, float* difference, float* row, \
                                        std::size_t i, const Maps& m) {                                           \
    return forward_row(a, b, pooled, difference, row, i, m);                                                      \
  }                                                                                                               \
  FASTMOCO_CLONES void backward_row_of(const float* difference, float scale, T* da, float* row, std::size_t y,    \
                                       const Maps& m) {                                                           \
    backward_row(difference, scale, da, row, y, m);                                                               \
  }
FASTMOCO_POOLED_MSE_ROWS(float)
FASTMOCO_POOLED_MSE_ROWS(BFloat16)
FASTMOCO_POOLED_MSE_ROWS(Half)
#undef FASTMOCO_POOLED_MSE_ROWS

// Calls run(task, scratch) for each of `tasks`, with `scratch` floats of a thread's own.
template <typename Run>
void parallel(std::size_t tasks, std::size_t scratch, int threads, const Run& run) {
  const int team = static_cast<int>(std::min<std::size_t>(tasks, static_cast<std::size_t>(threads)));
  std::vector<float> memory(static_cast<std::size_t>(team) * scratch);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (std::size_t task = 0; task < tasks; ++task)
    run(task, memory.data() + static_cast<std::size_t>(omp_get_thread_num()) * scratch);
#else
  for (std::size_t task = 0; task < tasks; ++task) run(task, memory.data());
#endif
}

}  // namespace

template <typename T>
double pooled_mse_forward(const T* a, const T* b, const float* pooled, float* difference, const Maps& m,
                          int threads) {
  const std::size_t map = m.height * m.width * m.channels, cells = m.grid * m.channels;
  std::vector<double> squares(m.batch * m.grid);
  parallel(squares.size(), m.width * m.channels, threads, [&](std::size_t task, float* row) {
    const std::size_t image = task / m.grid;
    squares[task] = forward_row_of(a + image * map, b == nullptr ? nullptr : b + image * map,
                                   pooled == nullptr ? nullptr : pooled + task * cells, difference + task * cells, row,
                                   task % m.grid, m);
  });
  double sum = 0;
  for (const double part : squares) sum += part;
  return sum / (static_cast<double>(squares.size()) * static_cast<double>(cells));
}

template <typename T>
void pooled_mse_backward(const float* difference, float scale, T* da, const Maps& m, int threads) {
  const std::size_t line = m.width * m.channels, cells = m.grid * m.channels;
  parallel(m.batch * m.height, cells, threads, [&](std::size_t task, float* row) {
    const std::size_t image = task / m.height;
    backward_row_of(difference + image * m.grid * cells, scale, da + task * line, row, task % m.height, m);
  });
}

#define FASTMOCO_POOLED_MSE(T)                                                                                   \
  template double pooled_mse_forward(const T*, const T*, const float*, float*, const Maps&, int);                \
  template void pooled_mse_backward(const float*, float, T*, const Maps&, int);
FASTMOCO_POOLED_MSE(float)
FASTMOCO_POOLED_MSE(BFloat16)
FASTMOCO_POOLED_MSE(Half)
#undef FASTMOCO_POOLED_MSE

}  // namespace fastmoco
