// A view on a CPU, from the image to float16, in the vectors of one instruction set.
#pragma once

#include "views_lanes.h"
#include "views_pixel.h"
#include "views_resample.h"
#include "views_rotate.h"
#include "views_work.h"

namespace fastmoco {
namespace {

// One column of the picture, which lies in the first-level cache while every operation passes over it.
struct Column {
  float* values;
  std::size_t pitch;

  FASTMOCO_LOCAL Colour<Lanes> at(std::size_t y) const {
    return {load(values + y), load(values + pitch + y), load(values + 2 * pitch + y)};
  }

  template <typename Operation>
  FASTMOCO_LOCAL void operator()(const Operation& operation) const {
    for (std::size_t y = 0; y < pitch; y += kLanes) {
      const Colour<Lanes> c = operation(at(y));
      store(values + y, c.r);
      store(values + pitch + y, c.g);
      store(values + 2 * pitch + y, c.b);
    }
  }

  // The sum of the gray image's first `size` pixels.
  FASTMOCO_LOCAL double gray(std::size_t size) const {
    Lanes sums{};
    std::size_t y = 0;
    for (; y + kLanes <= size; y += kLanes) sums += gray_of(at(y));
    const Lanes last = gray_of(at(y < pitch ? y : 0));
    double sum = 0;
    for (std::size_t i = 0; i < size - y; ++i) sum += last[i];
    for (std::size_t i = 0; i < kLanes; ++i) sum += sums[i];
    return sum;
  }
};

FASTMOCO_LOCAL Column column(const ViewWork& work, int x) {
  return {work.picture + 3 * static_cast<std::size_t>(x) * work.pitch, work.pitch};
}

// The operations before the contrast, and the mean that it is about.
FASTMOCO_LOCAL float mean_gray(const ViewWork& work, int contrast) {
  double sum = 0;
  for (int x = 0; x < work.size; ++x) {
    const Column values = column(work, x);
    jitter(work.view, 0, contrast, 0.0f, values);
    sum += values.gray(static_cast<std::size_t>(work.size));
  }
  return static_cast<float>(sum / (static_cast<double>(work.size) * work.size));
}

// One row of the picture, blurred along itself.
FASTMOCO_LOCAL void blur_along(const ViewWork& work, const float* from, float* to) {
  const int radius = work.radius, size = work.size;
  float* const line = work.line;
  std::memcpy(line + radius, from, work.pitch * sizeof(float));
  for (int d = 1; d <= radius; ++d) {
    line[radius - d] = from[d];
    line[radius + size - 1 + d] = from[size - 1 - d];
  }
  for (std::size_t y = 0; y < work.pitch; y += kLanes) {
    const float* const centre = line + radius + y;
    Vec sum = load(centre) * work.gaussian[0];
    for (int d = 1; d <= radius; ++d) sum = fma(load(centre - d) + load(centre + d), splat(work.gaussian[d]), sum);
    store(to + y, sum);
  }
}

FASTMOCO_LOCAL float* ring_column(const ViewWork& work, int x) {
  return work.ring + static_cast<std::size_t>(x % (2 * work.radius + 1)) * 3 * work.pitch;
}

// Column `x` of the picture, from the columns beside it that the ring holds.
FASTMOCO_LOCAL void blur_across(const ViewWork& work, int x) {
  const int radius = work.radius;
  for (int d = 1; d <= radius; ++d) {
    work.beside[2 * d - 2] = ring_column(work, reflected(x - d, work.size));
    work.beside[2 * d - 1] = ring_column(work, reflected(x + d, work.size));
  }
  const float* const centre = ring_column(work, x);
  float* const to = column(work, x).values;
  for (std::size_t y = 0; y < 3 * work.pitch; y += 3 * kLanes) {
    Vec a = load(centre + y) * work.gaussian[0], b = load(centre + y + kLanes) * work.gaussian[0],
        c = load(centre + y + 2 * kLanes) * work.gaussian[0];
    for (int d = 1; d <= radius; ++d) {
      const float *const left = work.beside[2 * d - 2] + y, *const right = work.beside[2 * d - 1] + y;
      const Vec weight = splat(work.gaussian[d]);
      a = fma(load(left) + load(right), weight, a);
      b = fma(load(left + kLanes) + load(right + kLanes), weight, b);
      c = fma(load(left + 2 * kLanes) + load(right + 2 * kLanes), weight, c);
    }
    store(to + y, a);
    store(to + y + kLanes, b);
    store(to + y + 2 * kLanes, c);
  }
}

// The colour operations from place `first` on, gray and the blur, column by column; a column is blurred across as soon
// as those to its right have been blurred along.
FASTMOCO_LOCAL void colour_and_blur(const ViewWork& work, int first, float mean) {
  const int radius = work.radius;
  for (int x = 0; x < work.size + radius; ++x) {
    if (x < work.size) {
      const Column values = column(work, x);
      jitter(work.view, first, 4, mean, values);
      if (work.view.gray) values(Gray{});
      if (radius == 0) continue;
      float* const to = ring_column(work, x);
      for (std::size_t c = 0; c < 3; ++c) blur_along(work, values.values + c * work.pitch, to + c * work.pitch);
    }
    if (x >= radius) blur_across(work, x - radius);
  }
}

// kLanes values from `at` on of kLanes rows of the view from `y` on, whose rows have `values`.
FASTMOCO_LOCAL void store_block(const ViewWork& work, int y, int at, int values) {
  Vec v[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int to = at + i < values ? at + i : values - 1;
    const int from = work.view.flip ? 3 * (work.size - 1 - to / 3) + to % 3 : to;
    v[i] = load(work.picture + static_cast<std::size_t>(from) * work.pitch + y);
  }
  transpose(v);
  for (int i = 0; i < kLanes && y + i < work.size; ++i) {
    std::uint16_t* const to = work.out + static_cast<std::size_t>(y + i) * static_cast<std::size_t>(values) + at;
    if (values >= kLanes) {
      store_half(to, v[i]);
    } else {
      std::uint16_t few[kLanes];
      store_half(few, v[i]);
      std::memcpy(to, few, static_cast<std::size_t>(values) * 2);
    }
  }
}

// The picture as float16, rows first: blocks of it transposed.
FASTMOCO_LOCAL void store_view(const ViewWork& work) {
  const int values = 3 * work.size;
  for (int y = 0; y < work.size; y += kLanes)
    for (int j = 0; j < values; j += kLanes)
      // The last vector ends with the row.
      store_block(work, y, values < kLanes ? 0 : j + kLanes <= values ? j : values - kLanes, values);
}

FASTMOCO_LOCAL void make_view(const ViewWork& work) {
  if (work.image.wide) {
    resample<std::uint16_t>(work);
  } else {
    resample<std::uint8_t>(work);
  }
  const int contrast = before_contrast(work.view);
  const bool about_mean = work.view.factor[kContrast] != 1.0f;
  colour_and_blur(work, contrast, about_mean ? mean_gray(work, contrast) : 0.0f);
  if (work.view.angle == 0.0f) {
    store_view(work);
  } else {
    rotate(work);
  }
}

}  // namespace
}  // namespace fastmoco
