// Mean squared error of two feature maps after adaptive average pooling, and its gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#include "platform.h"

namespace fastmoco {

// Maps are (batch, height, width, channels) in memory, channels last, and pooled to grid x grid cells.
struct Maps {
  std::size_t batch, height, width, channels, grid;
};

// Sixteen bits of an element, converted to and from float32 as the hardware would: to the nearest, ties to even.
struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// Writes pool(a) - pool(b) to `difference`, (batch, grid, grid, channels), and returns the mean of its squares.
// Either `b` is a map like `a` and `pooled` null, or `pooled` holds pool(b), laid out as `difference`, and `b` is null.
// One pass over the maps. The result is the same to the last bit for any number of threads.
template <typename T>
double pooled_mse_forward(const T* a, const T* b, const float* pooled, float* difference, const Maps& maps,
                          int threads);

// Writes the gradient to `a`, whole: each pixel gathers `scale * difference / cell area` from the cells that it is in.
template <typename T>
void pooled_mse_backward(const float* difference, float scale, T* da, const Maps& maps, int threads);

}  // namespace fastmoco
