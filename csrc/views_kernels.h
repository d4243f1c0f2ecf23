// Views on a GPU, as steps over all pixels of a group of views: what each thread does. Nothing here needs CUDA, so that
// the CPU's tests can play every block and thread.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "pack.h"
#include "platform.h"
#include "views.h"
#include "views_axis.h"
#include "views_group.h"
#include "views_pixel.h"

namespace fastmoco {
namespace {

// Each step has `items` for every view, and run(group, view, item) does one of them, from what the steps before it have
// left and from nothing that another item of its own writes.

// The weights of both axes, and what the blur and the rotation have in common for all pixels.
struct Weigh {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return 2 * g.side() + 1; }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t item) {
    const ViewRecord& view = g.view(v);
    if (item == 2 * g.side()) {
      g.radius[v] = gaussian(view.sigma, g.blur_kernel, g.gaussian + g.gaussian_at(v));
      g.rotation[v] = Rotation::by(view.angle, g.size);
      return;
    }
    const bool across = item >= g.side();
    const std::uint32_t i = across ? item - g.side() : item;
    const std::size_t at = g.filter_at(v, across);
    // Weights of neighbouring pixels lie side by side, as their threads do.
    float* const weights = g.weights + at * static_cast<std::size_t>(g.taps) + i;
    const Axis axis = axis_of(g.images[view.image], view, g.size, across);
    g.length[at + i] = filter(axis, static_cast<int>(i), g.begin + at + i, weights, g.side());
  }
};

// A pixel on its way through the colour operations.
struct Coloured {
  Colour<float> colour;

  template <typename Operation>
  FASTMOCO_PIXEL void operator()(const Operation& operation) {
    colour = operation(colour);
  }
};

// The window resized, and the colour operations before the contrast.
struct Resample {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return g.pixels(); }

  // One axis of one output pixel.
  struct Taps {
    std::size_t begin;
    int length;
    const float* weights;

    FASTMOCO_PIXEL Taps(const ViewGroup& g, int v, bool across, std::uint32_t i) {
      const std::size_t at = g.filter_at(v, across);
      begin = static_cast<std::size_t>(g.begin[at + i]);
      length = g.length[at + i];
      weights = g.weights + at * static_cast<std::size_t>(g.taps) + i;
    }
  };

  template <typename Value>
  FASTMOCO_PIXEL static Colour<float> sample(const ViewImage& image, const Taps& down, const Taps& across,
                                             std::size_t size) {
    const std::size_t stride = 3 * static_cast<std::size_t>(image.width);
    const Value* column = reinterpret_cast<const Value*>(image.address) + down.begin * stride + 3 * across.begin;
    Colour<float> sum{0, 0, 0};
    for (int i = 0; i < across.length; ++i, column += 3) {
      Colour<float> part{0, 0, 0};
      const Value* from = column;
      for (int j = 0; j < down.length; ++j, from += stride)
        add(part, {static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2])},
            down.weights[static_cast<std::size_t>(j) * size]);
      add(sum, part, across.weights[static_cast<std::size_t>(i) * size]);
    }
    const float white = sizeof(Value) == 1 ? 255.0f : 65535.0f;
    return {sum.r / white, sum.g / white, sum.b / white};
  }

  FASTMOCO_PIXEL static void add(Colour<float>& sum, const Colour<float>& c, float weight) {
    sum = {fmaf(c.r, weight, sum.r), fmaf(c.g, weight, sum.g), fmaf(c.b, weight, sum.b)};
  }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t pixel) {
    const Taps down(g, v, false, pixel / g.side()), across(g, v, true, pixel % g.side());
    const ViewRecord& view = g.view(v);
    const ViewImage& image = g.images[view.image];
    Coloured made{image.wide ? sample<std::uint16_t>(image, down, across, g.side())
                             : sample<std::uint8_t>(image, down, across, g.side())};
    jitter(view, 0, before_contrast(view), 0.0f, made);
    g.put(g.picture, v, pixel, made.colour);
  }
};

// The gray image's sums over each column, where there is a contrast.
struct SumColumns {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return g.side(); }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t x) {
    if (g.view(v).factor[kContrast] == 1.0f) return;
    double sum = 0;
    for (std::uint32_t y = 0; y < g.side(); ++y) sum += gray_of(g.get(g.picture, v, y * g.side() + x));
    g.sums[ViewGroup::at(v, g.side()) + x] = sum;
  }
};

struct MeanOfColumns {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup&) { return 1; }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t) {
    if (g.view(v).factor[kContrast] == 1.0f) return;
    const double* const sums = g.sums + ViewGroup::at(v, g.side());
    double sum = 0;
    for (std::uint32_t x = 0; x < g.side(); ++x) sum += sums[x];
    g.mean[v] = static_cast<float>(sum / static_cast<double>(g.pixels()));
  }
};

// The colour operations from the contrast on, or all where there is none, and gray.
struct Recolour {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return g.pixels(); }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t pixel) {
    const ViewRecord& view = g.view(v);
    Coloured made{g.get(g.picture, v, pixel)};
    jitter(view, before_contrast(view), 4, view.factor[kContrast] == 1.0f ? 0.0f : g.mean[v], made);
    if (view.gray) made(Gray{});
    g.put(g.picture, v, pixel, made.colour);
  }
};

// One direction of the blur, where there is one: down from `picture` to `other`, and across from there back.
template <bool kAcross>
struct Blur {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return g.pixels(); }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t pixel) {
    const int radius = g.radius[v], size = g.size;
    if (radius == 0) return;
    const float *const from = kAcross ? g.other : g.picture, *const weights = g.gaussian + g.gaussian_at(v);
    const int x = static_cast<int>(pixel % g.side()), y = static_cast<int>(pixel / g.side());
    const auto beside = [&](int d) {
      const int column = kAcross ? reflected(x + d, size) : x, row = kAcross ? y : reflected(y + d, size);
      return g.get(from, v, g.pixel(column, row));
    };
    const Colour<float> centre = beside(0);
    Colour<float> sum{centre.r * weights[0], centre.g * weights[0], centre.b * weights[0]};
    for (int d = 1; d <= radius; ++d) {
      const Colour<float> a = beside(-d), b = beside(d);
      Resample::add(sum, {a.r + b.r, a.g + b.g, a.b + b.b}, weights[d]);
    }
    g.put(kAcross ? g.picture : g.other, v, pixel, sum);
  }
};

// Rotation, flip and float16.
struct Finish {
  FASTMOCO_PIXEL static std::uint32_t items(const ViewGroup& g) { return g.pixels(); }

  FASTMOCO_PIXEL static void run(const ViewGroup& g, int v, std::uint32_t pixel) {
    const ViewRecord& view = g.view(v);
    const int to = static_cast<int>(pixel % g.side()), y = static_cast<int>(pixel / g.side());
    const int x = view.flip ? g.size - 1 - to : to;
    const Colour<float> made = view.angle == 0.0f ? inside(g, v, x, y) : rotated(g, v, g.rotation[v](x, y));
    std::uint16_t* const out = g.out + 3 * ((g.first + static_cast<std::size_t>(v)) * g.pixels() + pixel);
    out[0] = half_bits(made.r);
    out[1] = half_bits(made.g);
    out[2] = half_bits(made.b);
  }

  FASTMOCO_PIXEL static Colour<float> inside(const ViewGroup& g, int v, int x, int y) {
    if (x < 0 || y < 0 || x >= g.size || y >= g.size) return {0, 0, 0};
    return g.get(g.picture, v, g.pixel(x, y));
  }

  FASTMOCO_PIXEL static Colour<float> rotated(const ViewGroup& g, int v, const Rotation::Source& s) {
    const Colour<float> a = inside(g, v, s.x, s.y), b = inside(g, v, s.x, s.y + 1);
    const Colour<float> c = inside(g, v, s.x + 1, s.y), d = inside(g, v, s.x + 1, s.y + 1);
    const float p = (1.0f - s.right) * (1.0f - s.down), q = (1.0f - s.right) * s.down;
    const float t = s.right * (1.0f - s.down), u = s.right * s.down;
    return {a.r * p + b.r * q + c.r * t + d.r * u, a.g * p + b.g * q + c.g * t + d.g * u,
            a.b * p + b.b * q + c.b * t + d.b * u};
  }
};

// Calls run(step) for every step, in order.
template <typename Run>
void for_each_step(Run run) {
  run(Weigh{});
  run(Resample{});
  run(SumColumns{});
  run(MeanOfColumns{});
  run(Recolour{});
  run(Blur<false>{});
  run(Blur<true>{});
  run(Finish{});
}

// Calls run(group) for the groups that `batch` goes through in.
template <typename Run>
void for_each_group(const ViewBatch& batch, const ViewSpace& space, void* workspace, Run run) {
  ViewGroup g{};
  g.images = batch.images;
  g.views = batch.views;
  g.out = batch.out;
  g.size = batch.size;
  g.blur_kernel = batch.blur_kernel;
  g.taps = static_cast<int>(space.taps);
  space.cut(workspace, &g);
  for (; g.first < batch.count; g.first += static_cast<std::size_t>(g.count)) {
    const std::size_t left = batch.count - g.first;
    g.count = left < static_cast<std::size_t>(space.group) ? static_cast<int>(left) : space.group;
    run(g);
  }
}

}  // namespace
}  // namespace fastmoco
