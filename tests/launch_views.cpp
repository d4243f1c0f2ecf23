// Plays every block and thread of the views' kernels on the CPU, in several groups and in both orders of the threads,
// and compares with the CPU's own loops in every instruction set that there is. Exits with 1 and a message at the first
// difference. Compiled and run by test_launch.py, with sanitizers, in memory of exactly the sizes asked for.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "views.h"
#include "views_kernels.h"

namespace {

using fastmoco::ViewBatch;
using fastmoco::ViewGroup;
using fastmoco::ViewImage;
using fastmoco::ViewRecord;

constexpr unsigned kBlockThreads = 256;

std::mt19937 random_bits(7);

int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float number(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

struct Images {
  std::vector<std::vector<std::uint8_t>> narrow;
  std::vector<std::vector<std::uint16_t>> wide;
  std::vector<ViewImage> table;

  void add(int height, int width) {
    const auto values = static_cast<std::size_t>(3 * height * width);
    const bool is_wide = table.size() % 2;
    if (is_wide) {
      wide.emplace_back(values);
      for (auto& x : wide.back()) x = static_cast<std::uint16_t>(random_bits());
    } else {
      narrow.emplace_back(values);
      for (auto& x : narrow.back()) x = static_cast<std::uint8_t>(random_bits());
    }
    const void* const address = is_wide ? static_cast<const void*>(wide.back().data()) : narrow.back().data();
    table.push_back({reinterpret_cast<std::uint64_t>(address), height, width, is_wide, 0});
  }
};

// A view of image `index` with every operation as likely as not.
ViewRecord drawn(const std::vector<ViewImage>& images, int index) {
  ViewRecord view{};
  const ViewImage& image = images[static_cast<std::size_t>(index)];
  view.image = index;
  int bounds[2] = {image.height, image.width};
  if (whole(0, 1)) {
    for (int axis = 0; axis < 2; ++axis) bounds[axis] = view.resized[axis] = whole(1, 60);
  }
  for (int axis = 0; axis < 2; ++axis) {
    view.window[2 + axis] = whole(0, 2) ? whole(1, bounds[axis]) : bounds[axis];
    view.window[axis] = whole(0, bounds[axis] - view.window[2 + axis]);
  }
  for (int i = 0; i < 4; ++i) view.order[i] = i;
  for (int i = 3; i > 0; --i) std::swap(view.order[i], view.order[whole(0, i)]);
  for (int i = 0; i < 3; ++i) view.factor[i] = whole(0, 1) ? number(0, 2) : 1.0f;
  view.factor[3] = whole(0, 1) ? number(-0.5, 0.5) : 0.0f;
  view.sigma = whole(0, 1) ? number(0.1f, 3.0f) : 0.0f;
  view.angle = whole(0, 1) ? number(-180, 180) : 0.0f;
  view.gray = whole(0, 3) == 0;
  view.flip = whole(0, 1);
  return view;
}

// A launch of the step over a group.
template <typename Step>
void play(Step, const ViewGroup& group, bool backwards) {
  const unsigned blocks = (Step::items(group) + kBlockThreads - 1) / kBlockThreads;
  for (int v = 0; v < group.count; ++v) {
    for (unsigned i = 0; i < blocks * kBlockThreads; ++i) {
      const unsigned item = backwards ? blocks * kBlockThreads - 1 - i : i;
      if (item < Step::items(group)) Step::run(group, v, item);
    }
  }
}

using Halves = std::vector<std::uint16_t>;

// What the kernels make, with workspace for groups of `most` views, filled with NaN beforehand.
Halves played(ViewBatch batch, std::size_t most, bool backwards, int* groups) {
  Halves out(batch.count * 3 * static_cast<std::size_t>(batch.size * batch.size), 0x7e00);
  batch.out = out.data();
  const int taps = fastmoco::room_for_taps(batch.images, batch.views, batch.count, batch.size);
  const fastmoco::ViewSpace one(1, batch.size, batch.blur_kernel, taps);
  const fastmoco::ViewSpace space(batch.count, batch.size, batch.blur_kernel, taps, most * one.each());
  const std::unique_ptr<std::uint8_t[]> workspace(new std::uint8_t[space.bytes()]);
  std::memset(workspace.get(), 0xff, space.bytes());
  fastmoco::for_each_group(batch, space, workspace.get(), [&](const ViewGroup& group) {
    ++*groups;
    fastmoco::for_each_step([&](auto step) { play(step, group, backwards); });
  });
  return out;
}

float value(std::uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  return exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                  : std::ldexp(static_cast<float>(mantissa), -24);
}

void compare(const Images& images, int size, int blur_kernel) {
  const int count = static_cast<int>(images.table.size());
  std::vector<ViewRecord> views;
  for (int i = 0; i < 2 * count; ++i) views.push_back(drawn(images.table, i % count));
  ViewBatch batch{images.table.data(), views.data(), views.size(), size, blur_kernel, nullptr};
  int all = 0, several = 0;
  const Halves ours = played(batch, views.size(), false, &all);
  expect(all == 1, "a large workspace took more than one group");
  expect(played(batch, 3, true, &several) == ours, "the order of the threads or the groups changes a bit");
  expect(several == (2 * count + 2) / 3, "a small workspace took the wrong number of groups");
  Halves theirs(ours.size());
  batch.out = theirs.data();
  for (const std::string& set : fastmoco::views_sets()) {
    std::fill(theirs.begin(), theirs.end(), std::uint16_t{0x7e00});
    fastmoco::make_views(batch, 2, set.c_str());
    std::size_t others = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
      const float apart = std::fabs(value(ours[i]) - value(theirs[i]));
      expect(ours[i] < 0x3c02 && theirs[i] < 0x3c02, "not a number from 0 to 1");
      // The spacing of float16 below 1: what differs in float's last bits may round to a neighbour.
      expect(apart <= 0x1p-11f, set + ": a pixel differs by more than its rounding");
      others += ours[i] != theirs[i];
    }
    expect(others * 50 <= ours.size() + 1000, set + ": too many pixels round differently");
  }
}

}  // namespace

int main() {
  Images images;
  const int shapes[][2] = {{1, 1}, {1, 7}, {7, 1}, {3, 5}, {40, 31}, {31, 40}, {8, 50}, {97, 13}, {13, 200}};
  for (const auto& shape : shapes) images.add(shape[0], shape[1]);
  for (const auto& shape : shapes) images.add(shape[1], shape[0]);
  for (const int size : {1, 2, 5, 15, 16, 17, 33, 48}) compare(images, size, size < 9 ? 1 : 2 * (size / 8) + 1);
  std::puts("the same");
}
