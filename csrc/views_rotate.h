// Rotation on a CPU. Its reads go across memory, so that the colours of a pixel are put side by side first.
#pragma once

#include "views_lanes.h"
#include "views_pixel.h"
#include "views_work.h"

namespace fastmoco {
namespace {

// Pixels on a side of the blocks that a rotation is done in, for what they read to stay in the first-level cache.
constexpr int kBlockSide = 32;
constexpr int kBatch = 16;

// Pixels from one column to the next: a border of zeros stands around the view.
FASTMOCO_LOCAL std::size_t quad_pitch(const ViewWork& work) { return static_cast<std::size_t>(work.size) + 3; }

// The picture as pixels, columns first.
FASTMOCO_LOCAL void spread(const ViewWork& work) {
  const auto size = static_cast<std::size_t>(work.size), pitch = quad_pitch(work);
  for (std::size_t i = 0; i < pitch; ++i) {
    for (const std::size_t side : {std::size_t{0}, size + 1, size + 2}) {
      store_quad(work.quads + 4 * (i * pitch + side), Quad{});
      store_quad(work.quads + 4 * (side * pitch + i), Quad{});
    }
  }
  for (std::size_t x = 0; x < size; ++x) {
    const float* const from = work.picture + 3 * x * work.pitch;
    float* const to = work.quads + 4 * ((x + 1) * pitch + 1);
    for (std::size_t y = 0; y < size; ++y)
      store_quad(to + 4 * y, Quad{from[y], from[work.pitch + y], from[2 * work.pitch + y], 0.0f});
  }
}

// `count` pixels of an output row from `x` on, at most kBatch.
FASTMOCO_LOCAL void rotate_few(const ViewWork& work, const Rotation& rotation, int x, int y, int count) {
  const std::size_t pitch = quad_pitch(work);
  std::int32_t place[kBatch];
  float weight[4][kBatch];
  for (int i = 0; i < kBatch; ++i) {
    const auto source = rotation(work.view.flip ? work.size - 1 - x - i : x + i, y);
    const float right = source.right, down = source.down;
    place[i] = (source.x + 1) * static_cast<std::int32_t>(pitch) + source.y + 1;
    weight[0][i] = (1.0f - right) * (1.0f - down);
    weight[1][i] = (1.0f - right) * down;
    weight[2][i] = right * (1.0f - down);
    weight[3][i] = right * down;
  }
  const auto size = static_cast<std::size_t>(work.size);
  std::uint16_t* const to = work.out + 3 * (static_cast<std::size_t>(y) * size + static_cast<std::size_t>(x));
  for (int i = 0; i < count; ++i) {
    const float* const left = work.quads + 4 * static_cast<std::size_t>(place[i]);
    const float* const right = left + 4 * pitch;
    const Quad made = load_quad(left) * weight[0][i] + load_quad(left + 4) * weight[1][i] +
                      load_quad(right) * weight[2][i] + load_quad(right + 4) * weight[3][i];
    // The fourth value is overwritten by the next pixel's first, where there is one.
    store_half(to + 3 * i, made, x + i + 1 < work.size ? 4 : 3);
  }
}

FASTMOCO_LOCAL void rotate(const ViewWork& work) {
  const Rotation rotation = Rotation::by(work.view.angle, work.size);
  const int size = work.size;
  for (int top = 0; top < size; top += kBlockSide)
    for (int left = 0; left < size; left += kBlockSide)
      for (int y = top; y < size && y < top + kBlockSide; ++y)
        for (int x = left; x < size && x < left + kBlockSide; x += kBatch)
          rotate_few(work, rotation, x, y, size - x < kBatch ? size - x : kBatch);
}

}  // namespace
}  // namespace fastmoco
