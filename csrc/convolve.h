// Convolutions of channels-last maps without the rows of windows that csrc/unfold.h makes, and without products with
// padding: at 2 x 2 places those of a 3 x 3 kernel are five of nine.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "unfold.h"

namespace fastmoco {

// Channels of both maps come in multiples of this.
constexpr std::size_t kChannelBlock = 32;

enum class MapDtype { kBFloat16, kFloat32 };

// `at` has the channels of the map that is convolved; `out` are those of what comes of it. Weights are (out, kernel_h,
// kernel_w, channels), of the maps' dtype. Sums are in float32, each in an order that is the same for any number of
// threads. AVX512-BF16 takes bfloat16 numbers below 2^-126 for 0, and makes results as small 0.
struct Convolution {
  Windows at;
  std::size_t out;
  MapDtype dtype;
  const char* instruction_set;  // one of convolve_sets()
};

// The instruction sets that have code for `dtype` in this build and run on this processor, the best first; none for
// bfloat16 without AVX512-BF16, and for float32 without AVX2.
std::vector<std::string> convolve_sets(MapDtype dtype);

// y (images, down, across, out) <- x (images, height, width, channels) convolved with weights.
void convolve(const void* x, const void* weights, void* y, const Convolution& of);

// The same of a map with any channels, meant for few, as images have; those that a stride across passes over must fill
// words of 32 bits. A line of the kernel is multiplied as one; in bfloat16, where it holds an odd number of numbers,
// with a 0 for the number behind it, which should be finite.
void convolve_few(const void* x, const void* weights, void* y, const Convolution& of);

// dx <- the gradient of `convolve` to x, dy being that to y.
void convolve_map_gradient(const void* dy, const void* weights, void* dx, const Convolution& of);

// dweights <- the gradient of `convolve` to the weights.
void convolve_weight_gradient(const void* x, const void* dy, void* dweights, const Convolution& of);

}  // namespace fastmoco
