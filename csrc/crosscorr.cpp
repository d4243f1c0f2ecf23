#include "crosscorr.h"

#include <algorithm>
#include <cmath>

namespace fastmoco {
namespace {

// Columns that one thread takes through the whole batch: their sums stay in registers' reach, and rows of a KiB are
// long enough to stream.
constexpr std::size_t kBlock = 256;

// Rows whose sum is float.
constexpr std::size_t kRows = 16;

// Below this a second thread costs more to wake than it saves (elements).
constexpr std::size_t kGrain = 131072;

// A block of `width` columns: its first element, and how far apart rows are.
struct Block {
  std::size_t batch, width, stride;
};

// Means over the batch of term(element, column) for each column, in float for a few rows at a time and in double from
// there: as fast as float, and near as good as double.
template <typename Term>
FASTMOCO_INLINE void means(const Block& b, double* __restrict mean, const Term& term) {
  std::fill_n(mean, b.width, 0.0);
  for (std::size_t first = 0; first < b.batch; first += kRows) {
    float part[kBlock] = {};
    for (std::size_t n = first; n < std::min(first + kRows, b.batch); ++n)
      for (std::size_t c = 0; c < b.width; ++c) part[c] += term(n * b.stride + c, c);
    for (std::size_t c = 0; c < b.width; ++c) mean[c] += part[c];
  }
  for (std::size_t c = 0; c < b.width; ++c) mean[c] /= static_cast<double>(b.batch);
}

FASTMOCO_INLINE void standardize_columns(const float* __restrict z, float* __restrict s, float* __restrict r,
                                         double epsilon, const Block& b) {
  double mean[kBlock];
  float centre[kBlock], rest[kBlock], factor[kBlock];
  means(b, mean, [z](std::size_t i, std::size_t) { return z[i]; });
  for (std::size_t c = 0; c < b.width; ++c) centre[c] = static_cast<float>(mean[c]);
  // What rounding left of the mean, which counts where a column is nearly constant.
  means(b, mean, [z, &centre](std::size_t i, std::size_t c) { return z[i] - centre[c]; });
  for (std::size_t c = 0; c < b.width; ++c) rest[c] = static_cast<float>(mean[c]);
  means(b, mean, [z, &centre, &rest](std::size_t i, std::size_t c) {
    const float d = z[i] - centre[c] - rest[c];
    return d * d;
  });
  for (std::size_t c = 0; c < b.width; ++c)
    r[c] = factor[c] = static_cast<float>(1 / std::sqrt(mean[c] + epsilon));
  for (std::size_t n = 0; n < b.batch; ++n)
    for (std::size_t c = 0; c < b.width; ++c)
      s[n * b.stride + c] = (z[n * b.stride + c] - centre[c] - rest[c]) * factor[c];
}

FASTMOCO_CLONES void standardize_block(const float* z1, const float* z2, float* s1, float* s2, float* r1, float* r2,
                                       float* diagonal, double epsilon, const Block& b) {
  standardize_columns(z1, s1, r1, epsilon, b);
  standardize_columns(z2, s2, r2, epsilon, b);
  double mean[kBlock];
  means(b, mean, [s1, s2](std::size_t i, std::size_t) { return s1[i] * s2[i]; });
  for (std::size_t c = 0; c < b.width; ++c) diagonal[c] = static_cast<float>(mean[c]);
}

FASTMOCO_CLONES void through_block(float* __restrict product, const float* __restrict other,
                                   const float* __restrict weight, const float* __restrict s,
                                   const float* __restrict r, float alpha, const Block& b) {
  double mean[kBlock];
  float along[kBlock];
  means(b, mean, [=](std::size_t i, std::size_t c) {
    product[i] = alpha * product[i] + weight[c] * other[i];
    return product[i] * s[i];
  });
  for (std::size_t c = 0; c < b.width; ++c) along[c] = static_cast<float>(mean[c]);
  for (std::size_t n = 0; n < b.batch; ++n)
    for (std::size_t c = 0; c < b.width; ++c) {
      const std::size_t i = n * b.stride + c;
      product[i] = r[c] * (product[i] - s[i] * along[c]);
    }
}

// Calls run(offset of the block's first element, offset of its first column, block) for all blocks of all stages.
template <typename Run>
void for_each_block(const Batches& m, int threads, const Run& run) {
  const std::size_t blocks = (m.features + kBlock - 1) / kBlock, tasks = m.stages * blocks;
  const std::size_t useful = std::min(tasks, (m.stages * m.batch * m.features + kGrain - 1) / kGrain);
  const int team = static_cast<int>(std::min<std::size_t>(useful, static_cast<std::size_t>(threads)));
  (void)team;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (std::size_t task = 0; task < tasks; ++task) {
    const std::size_t stage = task / blocks, column = task % blocks * kBlock;
    run(stage * m.batch * m.features + column, stage * m.features + column,
        Block{m.batch, std::min(kBlock, m.features - column), m.features});
  }
}

}  // namespace

void standardize(const float* z1, const float* z2, float* s1, float* s2, float* r1, float* r2, float* diagonal,
                 double epsilon, const Batches& batches, int threads) {
  for_each_block(batches, threads, [=](std::size_t i, std::size_t c, const Block& block) {
    standardize_block(z1 + i, z2 + i, s1 + i, s2 + i, r1 + c, r2 + c, diagonal + c, epsilon, block);
  });
}

void through_standardize(float* product, const float* other, const float* weight, const float* s, const float* r,
                         double alpha, const Batches& batches, int threads) {
  for_each_block(batches, threads, [=](std::size_t i, std::size_t c, const Block& block) {
    through_block(product + i, other + i, weight + c, s + i, r + c, static_cast<float>(alpha), block);
  });
}

}  // namespace fastmoco
