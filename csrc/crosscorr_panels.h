// Both passes over panels of columns. Included once per instruction set, by a file that first defines what lanes.h asks
// for. Columns lie along the lanes, as in memory, so only the Gram matrices need sums across lanes, once a block.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "crosscorr_gram.h"
#include "lanes.h"

namespace fastmoco {
namespace {

// Panels whose products are summed in registers: in L1 with 32 rows.
constexpr std::size_t kBlock = 8;

constexpr std::size_t kVectors = kPanel / kLanes;

// Rows and columns of a tile of a Gram matrix, by the registers there are.
constexpr std::size_t kTall = 4, kWide = kLanes == 16 ? 4 : 2;

// Masked where g++ 12 warns of the plain ones.
FASTMOCO_LOCAL Vec root(Vec x) {
#if FASTMOCO_LANES == 16
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif FASTMOCO_LANES == 8
  return _mm256_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

FASTMOCO_LOCAL float across(Vec x) {
#if FASTMOCO_LANES == 16
  const __m256 half = _mm512_maskz_extractf32x8_ps(0xff, x, 0) + _mm512_maskz_extractf32x8_ps(0xff, x, 1);
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
#elif FASTMOCO_LANES == 8
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  return (half[0] + half[2]) + (half[1] + half[3]);
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The mean over the batch of term(row), summed in short stretches of four sums side by side, which is quicker than one
// sum and loses less.
template <class Term>
FASTMOCO_LOCAL Vec mean_of(std::size_t batch, const Term& term) {
  Vec total{};
  for (std::size_t first = 0; first < batch; first += 16) {
    const std::size_t last = std::min(batch, first + 16);
    Vec sum[4] = {};
    std::size_t n = first;
    for (; n + 4 <= last; n += 4) {
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) sum[i] += term(n + i);
    }
    for (; n < last; ++n) sum[0] += term(n);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total / splat(static_cast<float>(batch));
}

struct From {
  const float* p;
  FASTMOCO_LOCAL Vec operator()(std::size_t n) const { return load(p + n * kPanel); }
};

struct Square {
  const float* p;
  Vec centre;
  FASTMOCO_LOCAL Vec operator()(std::size_t n) const {
    const Vec d = load(p + n * kPanel) - centre;
    return d * d;
  }
};

struct Centred {
  const float* p;
  Vec centre;
  FASTMOCO_LOCAL Vec operator()(std::size_t n) const { return load(p + n * kPanel) - centre; }
};

struct Product {
  const float* a;
  const float* b;
  FASTMOCO_LOCAL Vec operator()(std::size_t n) const { return load(a + n * kPanel) * load(b + n * kPanel); }
};

// A panel of one view as float32 to `s`, zeros beyond the batch and the features.
FASTMOCO_TARGET void fetch(const GramStage& g, const void* z, std::size_t panel, float* s) {
  const std::size_t column = panel * kPanel, width = std::min(kPanel, g.features - column);
  if (width < kPanel) std::memset(s, 0, g.batch * kPanel * sizeof(float));
  std::memset(s + g.batch * kPanel, 0, (g.rows - g.batch) * kPanel * sizeof(float));
  for (std::size_t n = 0; n < g.batch; ++n) {
    const std::size_t at = n * g.features + column;
    float* const row = s + n * kPanel;
    if (g.dtype == GramDtype::kBFloat16) {
      widen_bfloat16(static_cast<const std::uint16_t*>(z) + at, row, width);
    } else if (g.dtype == GramDtype::kFloat16) {
      widen_float16(static_cast<const std::uint16_t*>(z) + at, row, width);
    } else if (width == kPanel) {
      std::memcpy(row, static_cast<const float*>(z) + at, kPanel * sizeof(float));
    } else {
      std::memcpy(row, static_cast<const float*>(z) + at, width * sizeof(float));
    }
  }
}

FASTMOCO_TARGET void standardize(const GramStage& g, float* s, float* r) {
  for (std::size_t v = 0; v < kVectors; ++v, s += kLanes, r += kLanes) {
    const Vec centre = mean_of(g.batch, From{s});
    // What rounding left of the mean.
    const Vec rest = mean_of(g.batch, Centred{s, centre});
    const Vec variance = mean_of(g.batch, Square{s, centre}) - rest * rest;
    const Vec factor = splat(1.0f) / root(variance + splat(g.epsilon));
    store(r, factor);
    for (std::size_t n = 0; n < g.batch; ++n) store(s + n * kPanel, (load(s + n * kPanel) - centre - rest) * factor);
  }
}

// Adds the products of rows i.. and j.. over some panels to `gram`.
FASTMOCO_LOCAL void pairs(const float* s, std::size_t rows, std::size_t i, std::size_t j, std::size_t panels,
                          float* gram) {
  Vec sum[kTall][kWide] = {};
  for (std::size_t p = 0; p < panels; ++p) {
    const float* const left = s + (p * rows + i) * kPanel;
    const float* const right = s + (p * rows + j) * kPanel;
    for (std::size_t v = 0; v < kPanel; v += kLanes) {
      Vec b[kWide];
#pragma GCC unroll 4
      for (std::size_t y = 0; y < kWide; ++y) b[y] = load(right + y * kPanel + v);
#pragma GCC unroll 4
      for (std::size_t x = 0; x < kTall; ++x) {
        const Vec a = load(left + x * kPanel + v);
#pragma GCC unroll 4
        for (std::size_t y = 0; y < kWide; ++y) sum[x][y] = fma(a, b[y], sum[x][y]);
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t x = 0; x < kTall; ++x) {
#pragma GCC unroll 4
    for (std::size_t y = 0; y < kWide; ++y) gram[(i + x) * rows + j + y] += across(sum[x][y]);
  }
}

FASTMOCO_TARGET void gram_panels(const GramStage& g, std::size_t begin, std::size_t end, float* gram1, float* gram2) {
  float* const gram[2] = {gram1, gram2};
  const std::size_t size = g.rows * kPanel;
  for (float* matrix : gram) std::memset(matrix, 0, g.rows * g.rows * sizeof(float));
  for (std::size_t first = begin; first < end; first += kBlock) {
    const std::size_t last = std::min(end, first + kBlock);
    for (int view = 0; view < 2; ++view) {
      float* const s = g.s[view];
      for (std::size_t p = first; p < last; ++p) {
        fetch(g, g.z[view], p, s + p * size);
        standardize(g, s + p * size, g.r[view] + p * kPanel);
      }
      for (std::size_t i = 0; i < g.rows; i += kTall)
        for (std::size_t j = 0; j < i + kTall; j += kWide)
          pairs(s + first * size, g.rows, i, j, last - first, gram[view]);
    }
    for (std::size_t p = first; p < last; ++p)
      for (std::size_t v = 0; v < kPanel; v += kLanes)
        store(g.diagonal + p * kPanel + v, mean_of(g.batch, Product{g.s[0] + p * size + v, g.s[1] + p * size + v}));
  }
}

// Rows n.. of the gradient d to a view's standardised columns, V vectors of them: other * weight + gram @ own. Adds
// the sum of d * own to `along`.
template <std::size_t M, std::size_t V>
FASTMOCO_LOCAL void gradient_rows(const GramStage& g, const float* gram, std::size_t n, const float* own,
                                  const float* other, const Vec* weight, float* d, Vec* along) {
  Vec sum[M][V];
#pragma GCC unroll 8
  for (std::size_t m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (std::size_t v = 0; v < V; ++v) sum[m][v] = load(other + (n + m) * kPanel + v * kLanes) * weight[v];
  }
  for (std::size_t k = 0; k < g.batch; ++k) {
    Vec right[V];
#pragma GCC unroll 2
    for (std::size_t v = 0; v < V; ++v) right[v] = load(own + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (std::size_t m = 0; m < M; ++m) {
      const Vec left = splat(gram[k * g.rows + n + m]);
#pragma GCC unroll 2
      for (std::size_t v = 0; v < V; ++v) sum[m][v] = fma(left, right[v], sum[m][v]);
    }
  }
#pragma GCC unroll 2
  for (std::size_t v = 0; v < V; ++v) {
    Vec part{};
#pragma GCC unroll 8
    for (std::size_t m = 0; m < M; ++m) {
      part = fma(sum[m][v], load(own + (n + m) * kPanel + v * kLanes), part);
      store(d + ((n + m) * V + v) * kLanes, sum[m][v]);
    }
    along[v] += part;
  }
}

FASTMOCO_TARGET void gradient_panels(const GramStage& g, std::size_t begin, std::size_t end) {
  constexpr std::size_t V = 2, kWidth = V * kLanes, kRows = kLanes == 16 ? 8 : 4;
  alignas(64) float d[kGramRows * kWidth];
  for (std::size_t column = begin * kPanel; column < std::min(g.features, end * kPanel); column += kWidth) {
    const std::size_t at = column / kPanel * g.rows * kPanel + column % kPanel;
    const std::size_t width = std::min(kWidth, g.features - column);
    for (int view = 0; view < 2; ++view) {
      const float *const own = g.s[view] + at, *const other = g.s[1 - view] + at, *const gram = g.gram[1 - view];
      Vec weight[V], along[V] = {}, factor[V];
      for (std::size_t v = 0; v < V; ++v) {
        weight[v] = fma(splat(g.slope), load(g.diagonal + column + v * kLanes), splat(-g.offset));
        factor[v] = load(g.r[view] + column + v * kLanes);
      }
      std::size_t n = 0;
      for (; n + kRows <= g.rows; n += kRows) gradient_rows<kRows, V>(g, gram, n, own, other, weight, d, along);
      for (; n < g.rows; n += kTall) gradient_rows<kTall, V>(g, gram, n, own, other, weight, d, along);
      for (std::size_t v = 0; v < V; ++v)
        along[v] = along[v] * splat(1 / static_cast<float>(g.batch)) - splat(g.lost[1 - view]) * factor[v] * factor[v];
      for (n = 0; n < g.batch; ++n) {
        float* const row = d + n * kWidth;
        float* const to = g.dz[view] + n * g.features + column;
        float* const whole = width == kWidth ? to : row;
        for (std::size_t v = 0; v < V; ++v) {
          const Vec s = load(own + n * kPanel + v * kLanes);
          store(whole + v * kLanes, factor[v] * (load(row + v * kLanes) - s * along[v]));
        }
        if (whole == row) std::memcpy(to, row, width * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace fastmoco
