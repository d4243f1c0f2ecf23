#include "max_pool.h"

#include <algorithm>
#include <cstring>

#include "by_line.h"
#include "pack.h"
#include "platform.h"

namespace fastmoco {
namespace {

// Windows whose gradients are added up at once, and elements whose sums stay in the nearest cache between such groups.
constexpr std::size_t kTogether = 4;
constexpr std::size_t kBlock = 128;
// What no window took.
constexpr int kNoTap = kMostTaps;

struct Range {
  std::size_t first, last;
};

// Of the taps of a window that begins at `start` of the padded side those over the map.
FASTMOCO_INLINE Range taps_over(std::size_t start, std::size_t kernel, std::size_t pad, std::size_t side) {
  return {start < pad ? pad - start : 0, std::min(kernel, side + pad - start)};
}

// The windows that cover `place` of a side.
FASTMOCO_INLINE Range windows_over(std::size_t place, std::size_t kernel, std::size_t pad, std::size_t stride,
                                   std::size_t windows) {
  const std::size_t padded = place + pad;
  return {padded < kernel ? 0 : (padded - kernel) / stride + 1, std::min(windows, padded / stride + 1)};
}

FASTMOCO_INLINE bool replaces(float value, float largest) { return (value > largest) | (value != value); }

template <typename T>
FASTMOCO_INLINE T as_read(float value) {
  if constexpr (sizeof(T) == 2) {
    // No rounding: it was a bfloat16 before.
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<T>(bits >> 16);
  } else {
    return value;
  }
}

// The largest of kTaps vectors; with kOn of them and what y and index have of others before them.
template <std::size_t kTaps, bool kOn, bool kIndexed, typename T>
FASTMOCO_INLINE void take(const T* const* vectors, const int* taps, T* y, std::uint8_t* index, std::size_t channels) {
  // Copied: to the compiler whatever is written to `index`, bytes, may change what lies in memory.
  const T* from[kTaps];
  int tap[kTaps];
#pragma GCC unroll 16
  for (std::size_t k = 0; k < kTaps; ++k) {
    from[k] = vectors[k];
    tap[k] = taps[k];
  }
#pragma GCC ivdep
  for (std::size_t c = 0; c < channels; ++c) {
    float largest = value_of(kOn ? y[c] : from[0][c]);
    int of = kOn && kIndexed ? index[c] : tap[0];
#pragma GCC unroll 16
    for (std::size_t k = kOn ? 0 : 1; k < kTaps; ++k) {
      const float value = value_of(from[k][c]);
      const bool taken = replaces(value, largest);
      largest = taken ? value : largest;
      of = taken ? tap[k] : of;
    }
    y[c] = as_read<T>(largest);
    if constexpr (kIndexed) index[c] = static_cast<std::uint8_t>(of);
  }
}

// One line of y, by kTaps taps at a time.
template <std::size_t kTaps, bool kIndexed, typename T>
FASTMOCO_INLINE void pool_line(const T* x, T* y, std::uint8_t* index, const Windows& at, std::size_t image,
                               std::size_t oy) {
  const std::size_t across = at.across(), top = oy * at.stride_h, size = at.channels;
  const std::size_t slots = (at.taps() + kTaps - 1) / kTaps * kTaps;
  const Range rows = taps_over(top, at.kernel_h, at.pad_h, at.height);
  const std::size_t line = (image * at.down() + oy) * across * size;
  const T* from[kMostTaps + kTaps];
  int tap[kMostTaps + kTaps];
  for (std::size_t ox = 0; ox < across; ++ox) {
    const std::size_t left = ox * at.stride_w;
    const Range columns = taps_over(left, at.kernel_w, at.pad_w, at.width);
    std::size_t count = 0;
    for (std::size_t ky = rows.first; ky < rows.last; ++ky) {
      const T* row = x + (image * at.height + top + ky - at.pad_h) * at.width * size;
      for (std::size_t kx = columns.first; kx < columns.last; ++kx, ++count) {
        from[count] = row + (left + kx - at.pad_w) * size;
        tap[count] = static_cast<int>(ky * at.kernel_w + kx);
      }
    }
    // In place of what lies over padding the last tap again, which changes nothing.
    std::fill(from + count, from + slots, from[count - 1]);
    std::fill(tap + count, tap + slots, tap[count - 1]);
    T* const to = y + line + ox * size;
    std::uint8_t* const of = kIndexed ? index + line + ox * size : nullptr;
    take<kTaps, false, kIndexed>(from, tap, to, of, size);
    for (std::size_t k = kTaps; k < slots; k += kTaps) take<kTaps, true, kIndexed>(from + k, tap + k, to, of, size);
  }
}

template <bool kIndexed, typename T>
FASTMOCO_INLINE void pool_by_taps(const T* x, T* y, std::uint8_t* index, const Windows& at, std::size_t image,
                                  std::size_t oy) {
  if (at.taps() <= 4) return pool_line<4, kIndexed>(x, y, index, at, image, oy);
  pool_line<9, kIndexed>(x, y, index, at, image, oy);
}

// The number, or 0; by a mask, since a branch would keep the compiler from using vectors.
FASTMOCO_INLINE float where(bool kept, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= -static_cast<std::uint32_t>(kept);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Of the windows around a place of the map their gradients, the taps they took, and the one that lies over the place.
template <typename T>
struct Around {
  const T* dy[kMostTaps + kTogether];
  const std::uint8_t* index[kMostTaps + kTogether];
  int tap[kMostTaps + kTogether];
};

// to <- what kCount windows give, in channels from `begin`; with kOn it is added to what is there.
template <std::size_t kCount, bool kOn, typename T, typename To>
FASTMOCO_INLINE void give(const Around<T>& from, std::size_t first, std::size_t begin, To* to, std::size_t size) {
  const T* dy[kCount];
  const std::uint8_t* index[kCount];
  int tap[kCount];
#pragma GCC unroll 4
  for (std::size_t k = 0; k < kCount; ++k) {
    dy[k] = from.dy[first + k] + begin;
    index[k] = from.index[first + k] + begin;
    tap[k] = from.tap[first + k];
  }
#pragma GCC ivdep
  for (std::size_t c = 0; c < size; ++c) {
    float sum = kOn ? value_of(to[c]) : 0.0f;
#pragma GCC unroll 4
    for (std::size_t k = 0; k < kCount; ++k) sum += where(index[k][c] == tap[k], value_of(dy[k][c]));
    to[c] = stored<To>(sum);
  }
}

template <typename T>
FASTMOCO_INLINE void give_many(Around<T>& from, std::size_t count, T* dx, std::size_t size) {
  for (std::size_t k = count; k < count + kTogether; ++k) {
    from.dy[k] = from.dy[0];
    from.index[k] = from.index[0];
    from.tap[k] = kNoTap;
  }
  for (std::size_t begin = 0; begin < size; begin += kBlock) {
    const std::size_t width = std::min(kBlock, size - begin);
    float sum[kBlock];
    give<kTogether, false>(from, 0, begin, sum, width);
    for (std::size_t k = kTogether; k < count; k += kTogether) give<kTogether, true>(from, k, begin, sum, width);
    for (std::size_t c = 0; c < width; ++c) dx[begin + c] = stored<T>(sum[c]);
  }
}

template <typename T>
FASTMOCO_INLINE void unpool_line(const T* dy, const std::uint8_t* index, T* dx, const Windows& at, std::size_t image,
                                 std::size_t y) {
  const std::size_t down = at.down(), across = at.across(), size = at.channels;
  const Range rows = windows_over(y, at.kernel_h, at.pad_h, at.stride_h, down);
  T* to = dx + (image * at.height + y) * at.width * size;
  Around<T> from;
  for (std::size_t x = 0; x < at.width; ++x, to += size) {
    const Range columns = windows_over(x, at.kernel_w, at.pad_w, at.stride_w, across);
    std::size_t count = 0;
    for (std::size_t oy = rows.first; oy < rows.last; ++oy) {
      const std::size_t ky = y + at.pad_h - oy * at.stride_h;
      for (std::size_t ox = columns.first; ox < columns.last; ++ox, ++count) {
        const std::size_t window = ((image * down + oy) * across + ox) * size;
        from.dy[count] = dy + window;
        from.index[count] = index + window;
        from.tap[count] = static_cast<int>(ky * at.kernel_w + x + at.pad_w - ox * at.stride_w);
      }
    }
    if (count == 0) {
      std::memset(to, 0, size * sizeof(T));
    } else if (count == 1) {
      give<1, false>(from, 0, 0, to, size);
    } else if (count == 2) {
      give<2, false>(from, 0, 0, to, size);
    } else if (count == 4) {
      give<4, false>(from, 0, 0, to, size);
    } else {
      give_many(from, count, to, size);
    }
  }
}

// Functions by name, since a template cannot be cloned, of a line each: a call of one costs more than a jump.
#define POOL_OF(clones, T)                                                                                       \
  clones void pool(const T* x, T* y, std::uint8_t* index, const Windows& at, std::size_t image, std::size_t oy) { \
    if (index == nullptr) return pool_by_taps<false>(x, y, index, at, image, oy);                                \
    pool_by_taps<true>(x, y, index, at, image, oy);                                                              \
  }                                                                                                              \
  clones void unpool(const T* dy, const std::uint8_t* index, T* dx, const Windows& at, std::size_t image,        \
                     std::size_t y) {                                                                            \
    unpool_line(dy, index, dx, at, image, y);                                                                    \
  }
POOL_OF(FASTMOCO_CLONES_16, std::uint16_t)
POOL_OF(FASTMOCO_CLONES, float)
#undef POOL_OF

}  // namespace

template <typename T>
void max_pool(const T* x, T* y, std::uint8_t* index, const Windows& at) {
  const std::size_t bytes = at.images * at.down() * at.across() * at.taps() * at.channels * sizeof(T);
  by_line(at.images, at.down(), bytes, at.threads,
          [&](std::size_t image, std::size_t oy) { pool(x, y, index, at, image, oy); });
}

template <typename T>
void max_pool_backward(const T* dy, const std::uint8_t* index, T* dx, const Windows& at) {
  const std::size_t bytes = at.images * at.height * at.width * at.channels * sizeof(T);
  by_line(at.images, at.height, bytes, at.threads,
          [&](std::size_t image, std::size_t y) { unpool(dy, index, dx, at, image, y); });
}

template void max_pool<std::uint16_t>(const std::uint16_t*, std::uint16_t*, std::uint8_t*, const Windows&);
template void max_pool<float>(const float*, float*, std::uint8_t*, const Windows&);
template void max_pool_backward<std::uint16_t>(const std::uint16_t*, const std::uint8_t*, std::uint16_t*,
                                               const Windows&);
template void max_pool_backward<float>(const float*, const std::uint8_t*, float*, const Windows&);

}  // namespace fastmoco
