// Where everything lies while a GPU makes a group of views.
#pragma once

#include <cstddef>
#include <cstdint>

#include "platform.h"
#include "views.h"
#include "views_axis.h"
#include "views_pixel.h"

namespace fastmoco {
namespace {

// What a step of views_kernels.h is given: addresses on the device. Views go through in groups, which bounds the
// workspace and leaves it in the second-level cache; `first` is the group's first view and `count` their number. `taps`
// is the room for an output pixel's weights.
struct ViewGroup {
  const ViewImage* images;
  const ViewRecord* views;
  std::uint16_t* out;
  std::size_t first;
  int count, size, blur_kernel, taps;

  // Of the group, by view: see ViewSpace.
  double* sums;
  float *picture, *other, *weights, *gaussian, *mean;
  Rotation* rotation;
  std::int32_t *begin, *length, *radius;

  FASTMOCO_PIXEL const ViewRecord& view(int v) const { return views[first + static_cast<std::size_t>(v)]; }
  // A view has fewer than 2^31 pixels (kMostSize).
  FASTMOCO_PIXEL std::uint32_t pixels() const { return side() * side(); }
  FASTMOCO_PIXEL std::uint32_t side() const { return static_cast<std::uint32_t>(size); }
  FASTMOCO_PIXEL std::uint32_t pixel(int x, int y) const { return static_cast<std::uint32_t>(y * size + x); }
  // The first number of view v in an array that has `each` for every view.
  FASTMOCO_PIXEL static std::size_t at(int v, std::size_t each) { return static_cast<std::size_t>(v) * each; }
  // Of both axes of view v.
  FASTMOCO_PIXEL std::size_t filter_at(int v, int axis) const {
    return static_cast<std::size_t>(2 * v + axis) * side();
  }
  FASTMOCO_PIXEL std::size_t gaussian_at(int v) const { return at(v, static_cast<std::size_t>(blur_kernel / 2 + 1)); }

  FASTMOCO_PIXEL Colour<float> get(const float* planes, int v, std::uint32_t pixel) const {
    const float* const p = planes + at(v, std::size_t{3} * pixels()) + pixel;
    return {p[0], p[pixels()], p[std::size_t{2} * pixels()]};
  }
  FASTMOCO_PIXEL void put(float* planes, int v, std::uint32_t pixel, const Colour<float>& c) const {
    float* const p = planes + at(v, std::size_t{3} * pixels()) + pixel;
    p[0] = c.r;
    p[pixels()] = c.g;
    p[std::size_t{2} * pixels()] = c.b;
  }
};

// How a workspace is cut into the arrays of a group.
struct ViewSpace {
  // What a group may take, whatever the number of views; a view alone may take more.
  static constexpr std::size_t kBytes = std::size_t{32} << 20;

  int group;
  std::size_t size, taps, kernel;

  ViewSpace(std::size_t count, int view_size, int blur_kernel, int most_taps, std::size_t bytes = kBytes)
      : size(static_cast<std::size_t>(view_size)),
        taps(static_cast<std::size_t>(most_taps)),
        kernel(static_cast<std::size_t>(blur_kernel / 2 + 1)) {
    std::size_t views = bytes / each();
    if (views > count) views = count;
    // The most that a grid has in its second direction.
    if (views > 65535) views = 65535;
    group = views == 0 ? 1 : static_cast<int>(views);
  }

  std::size_t each() const {
    const std::size_t floats = 2 * 3 * size * size + 2 * size * taps + kernel + 1, integers = 2 * 2 * size + 1;
    return size * sizeof(double) + 4 * (floats + integers) + sizeof(Rotation);
  }
  std::size_t bytes() const { return static_cast<std::size_t>(group) * each(); }

  // `workspace` holds bytes(), aligned for doubles.
  void cut(void* workspace, ViewGroup* g) const {
    const auto views = static_cast<std::size_t>(group);
    g->sums = static_cast<double*>(workspace);
    g->picture = reinterpret_cast<float*>(g->sums + views * size);
    g->other = g->picture + views * 3 * size * size;
    g->weights = g->other + views * 3 * size * size;
    g->gaussian = g->weights + views * 2 * size * taps;
    g->mean = g->gaussian + views * kernel;
    g->rotation = reinterpret_cast<Rotation*>(g->mean + views);
    g->begin = reinterpret_cast<std::int32_t*>(g->rotation + views);
    g->length = g->begin + views * 2 * size;
    g->radius = g->length + views * 2 * size;
  }
};

// Room for the weights of every output pixel of these views.
inline int room_for_taps(const ViewImage* images, const ViewRecord* views, std::size_t count, int size) {
  int most = 1;
  for (std::size_t i = 0; i < count; ++i)
    for (const bool across : {false, true}) {
      const int taps = most_taps(axis_of(images[views[i].image], views[i], size, across));
      most = taps > most ? taps : most;
    }
  return most;
}

}  // namespace
}  // namespace fastmoco
