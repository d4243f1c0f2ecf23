// Resampling weights along one axis: which pixels of the image an output pixel is made of, and how much of each.
#pragma once

#include <cstddef>

#include "platform.h"
#include "views.h"

namespace fastmoco {
namespace {

// `source` pixels are resized to `resized` (0: they are not); the `length` from `begin` on of these are resized to
// `size`. Both steps are linear, so that their product is one filter.
struct Axis {
  int source, resized, begin, length, size;
};

FASTMOCO_HOST_DEVICE inline Axis axis_of(const ViewImage& image, const ViewRecord& view, int size, bool across) {
  const int source = across ? image.width : image.height;
  return {source, view.resized[across], view.window[across], view.window[2 + across], size};
}

FASTMOCO_HOST_DEVICE inline float scale_of(int in, int out) {
  return static_cast<float>(in) / static_cast<float>(out);
}

// One step's filter for output pixel `i`: a triangle over pixels first to first + count - 1, in float and in the order
// in which torch computes it, as its rounding is part of the definition.
struct Triangle {
  int first, count;
  float centre, inverse, total;

  FASTMOCO_HOST_DEVICE Triangle(int in, int out, int i) : first(i), count(1), centre(0), inverse(1), total(1) {
    if (in == out) {
      centre = static_cast<float>(i) + 0.5f;
      return;
    }
    const float scale = scale_of(in, out), support = scale >= 1.0f ? scale : 1.0f;
    centre = static_cast<float>(scale * (i + 0.5));
    inverse = scale >= 1.0f ? 1.0f / scale : 1.0f;
    const int begin = static_cast<int>(centre - support + 0.5);
    const int end = static_cast<int>(centre + support + 0.5);
    first = begin > 0 ? begin : 0;
    count = (end < in ? end : in) - first;
    total = 0;
    for (int j = 0; j < count; ++j) total += height(j);
  }

  FASTMOCO_HOST_DEVICE float height(int j) const {
    const float x = static_cast<float>((static_cast<float>(j + first) - centre + 0.5) * inverse);
    const float away = x < 0 ? -x : x;
    return away < 1.0f ? 1.0f - away : 0.0f;
  }

  FASTMOCO_HOST_DEVICE float weight(int j) const { return height(j) / total; }
};

// The most pixels that `filter` may give an output pixel of this axis.
FASTMOCO_HOST_DEVICE inline int most_taps(const Axis& axis) {
  const auto taps = [](int in, int out) { return in == out ? 1 : 2 * (in > out ? (in + out - 1) / out : 1) + 1; };
  const int last = taps(axis.length, axis.size);
  if (axis.resized == 0) return last;
  const int most = taps(axis.source, axis.resized) +
                   static_cast<int>(static_cast<float>(last - 1) * scale_of(axis.source, axis.resized)) + 2;
  return most < axis.source ? most : axis.source;
}

// Writes the weights of output pixel `i`, `stride` apart, where there is room for most_taps of them, and returns their
// number; `first` is the pixel of the image that the first belongs to.
FASTMOCO_HOST_DEVICE inline int filter(const Axis& axis, int i, int* first, float* weights, std::size_t stride) {
  const Triangle last(axis.length, axis.size, i);
  const int resized = axis.resized == 0 ? axis.source : axis.resized, from = axis.begin + last.first;
  const Triangle front(axis.source, resized, from), back(axis.source, resized, from + last.count - 1);
  const int count = back.first + back.count - front.first;
  *first = front.first;
  for (int j = 0; j < count; ++j) weights[static_cast<std::size_t>(j) * stride] = 0;
  for (int p = 0; p < last.count; ++p) {
    const Triangle one(axis.source, resized, from + p);
    const float share = last.weight(p);
    const int before = one.first - front.first;
    for (int j = 0; j < one.count; ++j) weights[static_cast<std::size_t>(before + j) * stride] += share * one.weight(j);
  }
  return count;
}

}  // namespace
}  // namespace fastmoco
