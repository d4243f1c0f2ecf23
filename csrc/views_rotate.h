// Rotation on a CPU, block by block: its reads go across memory, so that what a block is made of is first put
// together, the colours of a pixel side by side.
#pragma once

#include "views_lanes.h"
#include "views_pixel.h"
#include "views_work.h"

namespace fastmoco {
namespace {

constexpr int kBatch = 16;

// The part of the picture that a block of output pixels is made of, as pixels, columns first; zeros stand for what is
// outside the picture. It stays in the first-level cache.
struct Patch {
  int left, top, width, height;
  float* quads;

  FASTMOCO_LOCAL float* at(int x, int y) const { return quads + 4 * ((x - left) * height + y - top); }
};

// The patch for the block of output pixels from (left, top) to (right, bottom), before a flip.
FASTMOCO_LOCAL Patch patch_of(const ViewWork& work, const Rotation& rotation, int left, int top, int right,
                              int bottom) {
  int low_x = work.size, low_y = work.size, high_x = -1, high_y = -1;
  for (const int x : {left, right}) {
    for (const int y : {top, bottom}) {
      const auto corner = rotation(x, y);
      low_x = corner.x < low_x ? corner.x : low_x;
      low_y = corner.y < low_y ? corner.y : low_y;
      high_x = corner.x > high_x ? corner.x : high_x;
      high_y = corner.y > high_y ? corner.y : high_y;
    }
  }
  // Pixels have a neighbour on their right and below; rounding may move one by one pixel past the corners.
  return {low_x - 1, low_y - 1, high_x - low_x + 4, high_y - low_y + 4, work.quads};
}

FASTMOCO_LOCAL void fill(const ViewWork& work, const Patch& patch) {
  for (int x = patch.left; x < patch.left + patch.width; ++x) {
    float* const to = patch.at(x, patch.top);
    if (x < 0 || x >= work.size) {
      std::memset(to, 0, static_cast<std::size_t>(patch.height) * 4 * sizeof(float));
      continue;
    }
    const std::size_t pitch = work.pitch;
    const float* const r = work.picture + 3 * static_cast<std::size_t>(x) * pitch + patch.top;
    const float *const g = r + pitch, *const b = g + pitch;
    const int height = patch.height, below = work.size - patch.top;
    const int begin = patch.top < 0 ? -patch.top : 0, end = height < below ? height : below;
    for (int y = 0; y < begin; ++y) store_quad(to + 4 * y, Quad{});
    for (int y = begin; y < end; ++y) store_quad(to + 4 * y, Quad{r[y], g[y], b[y], 0.0f});
    for (int y = end; y < height; ++y) store_quad(to + 4 * y, Quad{});
  }
}

// `count` pixels of an output row from `x` on, at most kBatch.
FASTMOCO_LOCAL void rotate_few(const ViewWork& work, const Rotation& rotation, const Patch& patch, int x, int y,
                               int count) {
  std::int32_t place[kBatch];
  float weight[4][kBatch];
  for (int i = 0; i < kBatch; ++i) {
    const auto source = rotation(work.view.flip ? work.size - 1 - x - i : x + i, y);
    const float right = source.right, down = source.down;
    place[i] = 4 * ((source.x - patch.left) * patch.height + source.y - patch.top);
    weight[0][i] = (1.0f - right) * (1.0f - down);
    weight[1][i] = (1.0f - right) * down;
    weight[2][i] = right * (1.0f - down);
    weight[3][i] = right * down;
  }
  const auto size = static_cast<std::size_t>(work.size);
  std::uint16_t* const to = work.out + 3 * (static_cast<std::size_t>(y) * size + static_cast<std::size_t>(x));
  const float* const quads = patch.quads;
  const std::ptrdiff_t column = 4 * patch.height;
  const auto made = [&](int i) FASTMOCO_TARGET {
    const float *const left = quads + place[i], *const right = left + column;
    return load_quad(left) * weight[0][i] + load_quad(left + 4) * weight[1][i] + load_quad(right) * weight[2][i] +
           load_quad(right + 4) * weight[3][i];
  };
  // The fourth value is overwritten by the next pixel's first, where there is one.
  const int last = x + count == work.size ? count - 1 : count;
  for (int i = 0; i < last; ++i) store_half<4>(to + 3 * i, made(i));
  if (last < count) store_half<3>(to + 3 * last, made(last));
}

FASTMOCO_LOCAL void rotate(const ViewWork& work) {
  const Rotation rotation = Rotation::by(work.view.angle, work.size);
  const int size = work.size, last = size - 1;
  for (int top = 0; top < size; top += kRotationSide) {
    const int bottom = top + kRotationSide < size ? top + kRotationSide : size;
    for (int left = 0; left < size; left += kRotationSide) {
      const int right = left + kRotationSide < size ? left + kRotationSide : size;
      const int first = work.view.flip ? last - left : left, end = work.view.flip ? last - (right - 1) : right - 1;
      const Patch patch = patch_of(work, rotation, first, top, end, bottom - 1);
      fill(work, patch);
      for (int y = top; y < bottom; ++y)
        for (int x = left; x < right; x += kBatch)
          rotate_few(work, rotation, patch, x, y, right - x < kBatch ? right - x : kBatch);
    }
  }
}

}  // namespace
}  // namespace fastmoco
