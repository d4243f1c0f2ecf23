// Resampling on a CPU: down the columns of a block of rows, then along them, which by then lie across the lanes of a
// vector, so that both passes read memory in order.
#pragma once

#include "views_lanes.h"
#include "views_work.h"

namespace fastmoco {
namespace {

// A sum over taps of weights times pixels `stride` apart. kTaps is their number where it is known to the compiler.
template <int kTaps, typename Pixel>
FASTMOCO_LOCAL Vec down(const Pixel* from, std::size_t stride, const float* weights, int taps) {
  Vec sum = widen(from) * weights[0];
  for (int k = 1; k < (kTaps ? kTaps : taps); ++k) sum = fma(widen(from + k * stride), splat(weights[k]), sum);
  return sum;
}

// The kBlockRows output rows from `row` on, of the `values` numbers from column `begin` of the image on: to the tile.
template <int kTaps, typename Pixel>
FASTMOCO_LOCAL void down_columns(const ViewWork& work, int row, int begin, int values) {
  const auto* const pixels = reinterpret_cast<const Pixel*>(work.image.address);
  const std::size_t stride = 3 * static_cast<std::size_t>(work.image.width);
  const int taps = kTaps ? kTaps : work.rows.taps;
  for (int part = 0; part < kBlockRows; part += kLanes) {
    const Pixel* from[kLanes];
    const float* weights[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int y = row + part + i < work.size ? row + part + i : work.size - 1;
      from[i] = pixels + static_cast<std::size_t>(work.rows.first[y]) * stride + 3 * static_cast<std::size_t>(begin);
      weights[i] = work.rows.weights + static_cast<std::size_t>(y) * static_cast<std::size_t>(taps);
    }
    float* const tile = work.tile + part;
    for (int j = 0; j < values; j += kLanes) {
      // The last vector ends with the row.
      const int at = values < kLanes ? 0 : j + kLanes <= values ? j : values - kLanes;
      Vec v[kLanes];
      if (values >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = down<kTaps>(from[i] + at, stride, weights[i], taps);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          v[i] = Vec{};
          for (int k = 0; k < taps; ++k) {
            Pixel few[kLanes] = {};
            const auto bytes = static_cast<std::size_t>(values) * sizeof(Pixel);
            std::memcpy(few, from[i] + static_cast<std::size_t>(k) * stride, bytes);
            v[i] = fma(widen(few), splat(weights[i][k]), v[i]);
          }
        }
      }
      transpose(v);
      const int count = values < kLanes ? values : kLanes;
      for (int i = 0; i < count; ++i) store(tile + (at + i) * kBlockRows, v[i]);
    }
  }
}

// Output columns x to `end` of a block of rows, from the tile, whose first column is `begin`.
template <int kTaps>
FASTMOCO_LOCAL void along_rows(const ViewWork& work, int row, int begin, int x, int end, float white) {
  const float reciprocal = 1.0f / white;
  const int taps = kTaps ? kTaps : work.columns.taps;
  for (; x < end; ++x) {
    const float* const weights = work.columns.weights + static_cast<std::size_t>(x) * static_cast<std::size_t>(taps);
    const float* const from = work.tile + static_cast<std::size_t>(work.columns.first[x] - begin) * 3 * kBlockRows;
    float* const to = work.picture + 3 * static_cast<std::size_t>(x) * work.pitch + row;
    for (int part = 0; part < kBlockRows; part += kLanes) {
      Vec r{}, g{}, b{};
      for (int k = 0; k < taps; ++k) {
        const float* const p = from + k * 3 * kBlockRows + part;
        const Vec weight = splat(weights[k]);
        r = fma(load(p), weight, r);
        g = fma(load(p + kBlockRows), weight, g);
        b = fma(load(p + 2 * kBlockRows), weight, b);
      }
      store(to + part, divided(r, white, reciprocal));
      store(to + work.pitch + part, divided(g, white, reciprocal));
      store(to + 2 * work.pitch + part, divided(b, white, reciprocal));
    }
  }
}

template <typename Pixel>
FASTMOCO_LOCAL void down_columns(const ViewWork& work, int row, int begin, int values) {
  switch (work.rows.taps) {
    case 1: return down_columns<1, Pixel>(work, row, begin, values);
    case 2: return down_columns<2, Pixel>(work, row, begin, values);
    case 3: return down_columns<3, Pixel>(work, row, begin, values);
    case 4: return down_columns<4, Pixel>(work, row, begin, values);
    case 5: return down_columns<5, Pixel>(work, row, begin, values);
    default: return down_columns<0, Pixel>(work, row, begin, values);
  }
}

FASTMOCO_LOCAL void along_rows(const ViewWork& work, int row, int begin, int x, int end, float white) {
  switch (work.columns.taps) {
    case 1: return along_rows<1>(work, row, begin, x, end, white);
    case 2: return along_rows<2>(work, row, begin, x, end, white);
    case 3: return along_rows<3>(work, row, begin, x, end, white);
    case 4: return along_rows<4>(work, row, begin, x, end, white);
    case 5: return along_rows<5>(work, row, begin, x, end, white);
    default: return along_rows<0>(work, row, begin, x, end, white);
  }
}

// The window of the image, resized to the view: floats from 0 to 1 in the picture.
template <typename Pixel>
FASTMOCO_LOCAL void resample(const ViewWork& work) {
  constexpr float kWhite = sizeof(Pixel) == 1 ? 255.0f : 65535.0f;
  const Filter& columns = work.columns;
  const int most = columns.taps > kTileColumns ? columns.taps : kTileColumns;
  for (int row = 0; row < work.size; row += kBlockRows) {
    for (int x = 0; x < work.size;) {
      const int begin = columns.first[x];
      int end = x + 1;
      while (end < work.size && columns.first[end] + columns.taps - begin <= most) ++end;
      const int until = columns.first[end - 1] + columns.taps;
      down_columns<Pixel>(work, row, begin, 3 * (until - begin));
      along_rows(work, row, begin, x, end, kWhite);
      x = end;
    }
  }
}

}  // namespace
}  // namespace fastmoco
