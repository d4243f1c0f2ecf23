#include "unfold.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "by_line.h"
#include "pack.h"
#include "platform.h"

namespace fastmoco {
namespace {

// Elements whose sums stay in registers and the nearest cache.
constexpr std::size_t kBlock = 128;

template <typename T>
FASTMOCO_INLINE void add_up(const T* const* from, std::size_t count, T* to, std::size_t size) {
  using Wide = decltype(value_of(T{}));
  for (std::size_t begin = 0; begin < size; begin += kBlock) {
    const std::size_t width = std::min(kBlock, size - begin);
    Wide sum[kBlock];
    for (std::size_t c = 0; c < width; ++c) sum[c] = value_of(from[0][begin + c]);
    for (std::size_t k = 1; k < count; ++k) {
      const T* next = from[k] + begin;
      for (std::size_t c = 0; c < width; ++c) sum[c] += value_of(next[c]);
    }
    for (std::size_t c = 0; c < width; ++c) to[begin + c] = stored<T>(sum[c]);
  }
}

// to <- the sums of `count` vectors. Functions by name, since a template cannot be cloned.
FASTMOCO_CLONES_16 void add(const std::uint16_t* const* from, std::size_t count, std::uint16_t* to, std::size_t size) {
  add_up(from, count, to, size);
}
FASTMOCO_CLONES void add(const float* const* from, std::size_t count, float* to, std::size_t size) {
  add_up(from, count, to, size);
}
FASTMOCO_CLONES void add(const double* const* from, std::size_t count, double* to, std::size_t size) {
  add_up(from, count, to, size);
}

// The window that has its place `tap` over `place` of the map, or `windows` where none has.
std::size_t window_over(std::size_t place, std::size_t tap, std::size_t pad, std::size_t stride, std::size_t windows) {
  if (place + pad < tap || (place + pad - tap) % stride != 0) return windows;
  return std::min((place + pad - tap) / stride, windows);
}

}  // namespace

void unfold(const unsigned char* x, unsigned char* rows, std::size_t element, const Windows& at) {
  const std::size_t pixel = at.channels * element, line = at.kernel_w * pixel;
  const std::size_t down = at.down(), across = at.across();
  const auto bytes = at.images * down * across * at.taps() * pixel;
  by_line(at.images, down, bytes, at.threads, [&](std::size_t image, std::size_t oy) {
    unsigned char* to = rows + (image * down + oy) * across * at.kernel_h * line;
    for (std::size_t ox = 0; ox < across; ++ox) {
      // Of the kernel's columns those over the map, not over what it is padded with.
      const auto columns = [&](std::size_t end) {
        const std::size_t left = ox * at.stride_w, edge = end + at.pad_w;
        return std::min(at.kernel_w, edge > left ? edge - left : 0);
      };
      const std::size_t first = columns(0), last = columns(at.width);
      for (std::size_t ky = 0; ky < at.kernel_h; ++ky, to += line) {
        const std::size_t y = oy * at.stride_h + ky;
        if (first == last || y < at.pad_h || y >= at.height + at.pad_h) {
          std::memset(to, 0, line);
          continue;
        }
        const std::size_t before = (image * at.height + y - at.pad_h) * at.width + ox * at.stride_w + first - at.pad_w;
        std::memset(to, 0, first * pixel);
        std::memcpy(to + first * pixel, x + before * pixel, (last - first) * pixel);
        std::memset(to + last * pixel, 0, line - last * pixel);
      }
    }
  });
}

template <typename T>
void fold(const T* rows, T* x, const Windows& at) {
  const std::size_t down = at.down(), across = at.across(), size = at.channels;
  const auto bytes = at.images * down * across * at.taps() * size * sizeof(T);
  by_line(at.images, at.height, bytes, at.threads, [&](std::size_t image, std::size_t y) {
    std::vector<const T*> from(at.taps());
    T* to = x + (image * at.height + y) * at.width * size;
    for (std::size_t column = 0; column < at.width; ++column, to += size) {
      std::size_t count = 0;
      for (std::size_t ky = 0; ky < at.kernel_h; ++ky) {
        const std::size_t oy = window_over(y, ky, at.pad_h, at.stride_h, down);
        if (oy == down) continue;
        for (std::size_t kx = 0; kx < at.kernel_w; ++kx) {
          const std::size_t ox = window_over(column, kx, at.pad_w, at.stride_w, across);
          if (ox == across) continue;
          const std::size_t window = (image * down + oy) * across + ox;
          from[count++] = rows + (window * at.taps() + ky * at.kernel_w + kx) * size;
        }
      }
      if (count == 0) {
        std::memset(to, 0, size * sizeof(T));
      } else {
        add(from.data(), count, to, size);
      }
    }
  });
}

template void fold<std::uint16_t>(const std::uint16_t*, std::uint16_t*, const Windows&);
template void fold<float>(const float*, float*, const Windows&);
template void fold<double>(const double*, double*, const Windows&);

}  // namespace fastmoco
