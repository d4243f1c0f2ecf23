#include "batch_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_norm_tiles.h"
#include "platform.h"

namespace fastmoco {
namespace {

// A tile is what a thread takes at a time: whole rows, which are read as they lie in memory, of maps as wide as those of
// residual networks. Its size depends on the channels alone, so that sums do not depend on the threads.
constexpr std::size_t kColumns = 2048;
std::size_t rows_of_tile(std::size_t channels) {
  return std::clamp<std::size_t>(32768 / std::max<std::size_t>(1, channels), 32, 256) / kGroup * kGroup;
}

// Below this a second thread costs more to wake than it saves (elements).
constexpr std::size_t kGrain = 32768;

// Two passes over the tiles of a map, between which each channel's two numbers of every tile become one.
// first(tile, numbers, numbers), merge(channel, rows of a tile's numbers), second(tile). The second pass takes tiles
// in the order of the first and by the same threads, so that a map as large as the caches is still there.
template <typename First, typename Merge, typename Second>
void two_passes(const Pixels& map, const First& first, const Merge& merge, const Second& second) {
  const std::size_t height = rows_of_tile(map.channels);
  const std::size_t down = (map.rows + height - 1) / height, across = (map.channels + kColumns - 1) / kColumns;
  const std::size_t tiles = down * across;
  std::vector<float> numbers(2 * down * map.channels);
  float* const low = numbers.data();
  float* const high = low + down * map.channels;
  const auto tile = [&](std::size_t i) {
    const std::size_t row = i / across * height, column = i % across * kColumns;
    return Tile{row * map.channels + column, column, std::min(height, map.rows - row),
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
  const NormTiles<T>& tiles = norm_tiles<T>(map.channels);
  const auto statistics_of = [&](const Tile& t, float* mean, float* squares) { tiles.statistics(x, mean, squares, t); };
  const std::size_t height = rows_of_tile(map.channels);
  const auto merge = [&](std::size_t c, const float* means, const float* squares, std::size_t down) {
    double mean = 0, square = 0;
    for (std::size_t i = 0; i < down; ++i) {
      const std::size_t before = i * height, after = std::min(before + height, map.rows);
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
  const auto apply_to = [&](const Tile& t) { tiles.apply(x, residual, y, relu, k, t); };
  two_passes(map, statistics_of, merge, apply_to);
}

template <typename T>
void batch_norm_backward(const T* dy, const T* x, const T* y, T* dx, T* dresidual, const Channels& k, float* dweight,
                         float* dbias, bool relu, const Pixels& map) {
  std::vector<float> means(2 * map.channels);
  float* const level = means.data();
  float* const slope = level + map.channels;
  const NormTiles<T>& tiles = norm_tiles<T>(map.channels);
  const bool written = dresidual != nullptr;
  const Act act = written ? Act::kResidualRelu : relu ? Act::kRelu : Act::kNone;
  const auto sums_of = [&](const Tile& t, float* sum, float* along) {
    tiles.sum({dy, x, y}, dresidual, act, sum, along, k, t);
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
    tiles.write({written ? dresidual : dy, x, nullptr}, dx, written ? Act::kNone : act, level, slope, k, t);
  };
  two_passes(map, sums_of, merge, write);
}

FASTMOCO_CLONES
void batch_norm_track(float* running, const float* batch, float momentum, std::size_t channels) {
  // From the nearer end, as torch has it.
  const bool near = std::abs(momentum) < 0.5f;
  const float share = near ? momentum : momentum - 1;
#pragma GCC ivdep
  for (std::size_t c = 0; c < channels; ++c) {
    running[c] = (near ? running[c] : batch[c]) + share * (batch[c] - running[c]);
  }
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
