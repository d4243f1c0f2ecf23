// The neighbourhoods of a channels-last map as rows of a matrix, which makes a convolution a matrix product (im2col),
// and their sums back in a map, its gradient (col2im).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmoco {

// Where a kernel is laid over an (images, height, width, channels) map, `pad` zeros around it. The kernel has to fit in
// the padded map. `threads` at most are used.
struct Windows {
  std::size_t images, height, width, channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int threads;

  std::size_t down() const { return (height + 2 * pad_h - kernel_h) / stride_h + 1; }
  std::size_t across() const { return (width + 2 * pad_w - kernel_w) / stride_w + 1; }
  std::size_t taps() const { return kernel_h * kernel_w; }
};

// rows (images, down, across, kernel_h, kernel_w, channels) <- what each window covers of x; `element` bytes each.
void unfold(const unsigned char* x, unsigned char* rows, std::size_t element, const Windows& at);

// x <- the sum, in float32 or wider, of all in `rows` that lies over each of its places, in the order of the kernel's.
// T is std::uint16_t for the bits of bfloat16, float or double.
template <typename T>
void fold(const T* rows, T* x, const Windows& at);

extern template void fold<std::uint16_t>(const std::uint16_t*, std::uint16_t*, const Windows&);
extern template void fold<float>(const float*, float*, const Windows&);
extern template void fold<double>(const double*, double*, const Windows&);

}  // namespace fastmoco
