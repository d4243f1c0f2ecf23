// The arithmetic of a pixel of a view, for floats on a GPU and for vectors of them on a CPU. A file that has vectors
// includes views_lanes.h first.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"
#include "views.h"

#if !defined(FASTMOCO_TARGET)
#define FASTMOCO_TARGET
#endif
#define FASTMOCO_PIXEL FASTMOCO_HOST_DEVICE FASTMOCO_TARGET FASTMOCO_INLINE

namespace fastmoco {
namespace {

FASTMOCO_PIXEL float larger(float a, float b) { return a > b ? a : b; }
FASTMOCO_PIXEL float smaller(float a, float b) { return a < b ? a : b; }

template <typename T>
FASTMOCO_PIXEL T clamped(T x) {
  return smaller(larger(x, T{}), T{} + 1.0f);
}

template <typename T>
struct Colour {
  T r, g, b;
};

template <typename T>
FASTMOCO_PIXEL T gray_of(const Colour<T>& c) {
  return c.r * 0.2989f + c.g * 0.587f + c.b * 0.114f;
}

struct Brightness {
  float factor;

  template <typename T>
  FASTMOCO_PIXEL Colour<T> operator()(const Colour<T>& c) const {
    return {clamped(c.r * factor), clamped(c.g * factor), clamped(c.b * factor)};
  }
};

// `mean` is that of the gray image.
struct Contrast {
  float factor, mean;

  template <typename T>
  FASTMOCO_PIXEL Colour<T> operator()(const Colour<T>& c) const {
    const float rest = mean * (1.0f - factor);
    return {clamped(c.r * factor + rest), clamped(c.g * factor + rest), clamped(c.b * factor + rest)};
  }
};

struct Saturation {
  float factor;

  template <typename T>
  FASTMOCO_PIXEL Colour<T> operator()(const Colour<T>& c) const {
    const T rest = gray_of(c) * (1.0f - factor);
    return {clamped(c.r * factor + rest), clamped(c.g * factor + rest), clamped(c.b * factor + rest)};
  }
};

// Hue in sixths of a turn from red, of which the colours are three trapezoids: what torchvision's way through HSV
// comes to, with one division and no table.
struct Hue {
  float shift;  // sixths of a turn, 0 to 6

  template <typename T>
  FASTMOCO_PIXEL Colour<T> operator()(const Colour<T>& c) const {
    const T most = larger(larger(c.r, c.g), c.b), least = smaller(smaller(c.r, c.g), c.b), chroma = most - least;
    const T zero{}, one = zero + 1.0f, six = zero + 6.0f;
    const T across = most == c.r ? c.g - c.b : most == c.g ? c.b - c.r : c.r - c.g;
    const T sector = most == c.r ? zero + shift : most == c.g ? zero + (shift + 2.0f) : zero + (shift + 4.0f);
    T hue = across / (chroma == zero ? one : chroma) + sector;
    hue = hue < zero ? hue + six : hue;
    hue = hue >= six ? hue - six : hue;
    return {least + chroma * clamped(apart(hue, 3.0f) - 1.0f), least + chroma * clamped(2.0f - apart(hue, 2.0f)),
            least + chroma * clamped(2.0f - apart(hue, 4.0f))};
  }

  template <typename T>
  FASTMOCO_PIXEL static T apart(T x, float y) {
    return larger(x - y, y - x);
  }
};

struct Gray {
  template <typename T>
  FASTMOCO_PIXEL Colour<T> operator()(const Colour<T>& c) const {
    const T gray = gray_of(c);
    return {gray, gray, gray};
  }
};

// The place of the contrast among a view's colour operations, which needs the mean of what the ones before it leave;
// 0 where there is none, or where it is the first.
FASTMOCO_PIXEL int before_contrast(const ViewRecord& view) {
  if (view.factor[kContrast] == 1.0f) return 0;
  int place = 0;
  while (view.order[place] != kContrast) ++place;
  return place;
}

// Calls run(operation) for the operations at places begin to end that are not neutral, in order.
template <typename Run>
FASTMOCO_PIXEL void jitter(const ViewRecord& view, int begin, int end, float mean, Run&& run) {
  for (int place = begin; place < end; ++place) {
    const int which = view.order[place];
    const float factor = view.factor[which];
    if (factor == (which == kHue ? 0.0f : 1.0f)) continue;
    if (which == kBrightness) run(Brightness{factor});
    if (which == kContrast) run(Contrast{factor, mean});
    if (which == kSaturation) run(Saturation{factor});
    if (which == kHue) run(Hue{6.0f * (factor < 0 ? factor + 1.0f : factor)});
  }
}

// Place `i` of a row of `size` pixels, reflected at its ends where it lies at most size - 1 outside.
FASTMOCO_PIXEL int reflected(int i, int size) { return i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i; }

// One side of a Gaussian's weights: weights[d] is that of pixels d away. Those too small to show in a float32 sum are
// left out. Returns the distance of the last; 0 where there is no blur.
FASTMOCO_PIXEL int gaussian(float sigma, int kernel, float* weights) {
  weights[0] = 1;
  if (sigma == 0.0f) return 0;
  const int most = kernel / 2;
  double total = 0;
  for (int d = most; d >= 0; --d) {
    const double x = d / static_cast<double>(sigma), w = std::exp(-0.5 * x * x);
    weights[d] = static_cast<float>(w);
    total += d == 0 ? w : 2 * w;
  }
  int radius = 0;
  for (int d = 0; d <= most; ++d) {
    weights[d] = static_cast<float>(weights[d] / total);
    if (weights[d] > 0x1p-24f) radius = d;
  }
  return radius;
}

// Where the pixels of a view lie before it is rotated about its centre.
struct Rotation {
  float cosine, sine, middle;

  FASTMOCO_PIXEL static Rotation by(float degrees, int size) {
#if defined(__CUDA_ARCH__)
    // cos and sin themselves would keep a table in local memory for angles of many turns.
    const double cosine = cospi(degrees / 180.0), sine = sinpi(degrees / 180.0);
#else
    const double cosine = std::cos(degrees * 0.017453292519943295), sine = std::sin(degrees * 0.017453292519943295);
#endif
    return {static_cast<float>(cosine), static_cast<float>(sine), 0.5f * static_cast<float>(size - 1)};
  }

  // Of pixel (x, y): its neighbours' first column and row, and how far it is from them. One that lies wholly outside
  // is moved to just outside, where everything it is made of is zero.
  struct Source {
    int x, y;
    float right, down;
  };

  FASTMOCO_PIXEL Source operator()(int x, int y) const {
    const float across = static_cast<float>(x) - middle, along = static_cast<float>(y) - middle;
    return at(cosine * across - sine * along + middle, sine * across + cosine * along + middle);
  }

  FASTMOCO_PIXEL Source at(float x, float y) const {
    const float last = 2.0f * middle + 1.0f;
    x = smaller(larger(x, -1.0f), last);
    y = smaller(larger(y, -1.0f), last);
    // Truncation of what is not negative rounds down.
    int left = static_cast<int>(x + 1.0f), top = static_cast<int>(y + 1.0f);
    const float right = x + 1.0f - static_cast<float>(left), down = y + 1.0f - static_cast<float>(top);
    return {left - 1, top - 1, right, down};
  }
};

}  // namespace
}  // namespace fastmoco
