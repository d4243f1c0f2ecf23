// The largest of each window over a channels-last map (max pooling), and its gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#include "unfold.h"

namespace fastmoco {

// Taps that a byte counts.
constexpr std::size_t kMostTaps = 255;

// T is std::uint16_t for the bits of bfloat16, or float. Of `at` the padding is at most half of the kernel, so that
// each window covers a place of the map, and the kernel has at most kMostTaps.

// y (images, down, across, channels) <- the largest that each window covers of x: of several the first, and NaN, of
// several the last, before all else. index <- which of the kernel's taps, counted row by row, lay over it; may be null.
template <typename T>
void max_pool(const T* x, T* y, std::uint8_t* index, const Windows& at);

// dx <- what dy has of those windows that took their value from there, summed in float32 in the order of the windows.
template <typename T>
void max_pool_backward(const T* dy, const std::uint8_t* index, T* dx, const Windows& at);

extern template void max_pool<std::uint16_t>(const std::uint16_t*, std::uint16_t*, std::uint8_t*, const Windows&);
extern template void max_pool<float>(const float*, float*, std::uint8_t*, const Windows&);
extern template void max_pool_backward<std::uint16_t>(const std::uint16_t*, const std::uint8_t*, std::uint16_t*,
                                                      const Windows&);
extern template void max_pool_backward<float>(const float*, const std::uint8_t*, float*, const Windows&);

}  // namespace fastmoco
