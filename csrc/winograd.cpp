#if defined(_OPENMP)
#include <omp.h>
#endif

#include "winograd.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "convolve_tiles.h"

namespace fastmoco {
namespace {

// `to` <- `from`, with `pad` zeros around, convolved with a kernel of 3 x 3.
class Winograd {
 public:
  Winograd(const Convolution& of, const Side& from, const Side& to, std::ptrdiff_t pad_h, std::ptrdiff_t pad_w)
      : tiles_(tiles_of(of)),
        images_(of.at.images),
        threads_(static_cast<std::size_t>(of.at.threads)),
        from_(from),
        to_(to),
        pad_h_(pad_h),
        pad_w_(pad_w),
        down_((to.height + 1) / 2),
        across_((to.width + 1) / 2) {}

  // pack(block, chunk, scratch, to) writes the transformed weights of 32 channels of `to`, (16, words of `from`, 32),
  // those of one chunk of 32 channels of `from`.
  template <typename Pack>
  void run(const std::uint32_t* from, std::uint32_t* to, const Pack& pack) const {
    const std::size_t row = from_.words, block = kTaps * row * kChannelBlock;
    const std::size_t blocks = to_.words * tiles_.packed / kChannelBlock;
    const std::size_t chunks = row * tiles_.packed / kChannelBlock;
    const std::size_t count = images_ * down_ * across_, even = count / (kParts * threads_) / tiles_.rows;
    // A block of tiles, transformed, stays near beside the weights of 32 channels.
    const std::size_t near = kNear / (4 * kTaps * row) / tiles_.rows;
    const std::size_t size = std::max<std::size_t>(1, std::min(even, near)) * tiles_.rows;
    const std::size_t parts = (count + size - 1) / size;
    const std::size_t scratch = std::max(kTaps * size * row, kTaps * kChannelBlock * kChannelBlock);
    const std::unique_ptr<std::uint32_t[]> weights(new std::uint32_t[blocks * block]);
    const std::unique_ptr<std::uint32_t[]> scratches(new std::uint32_t[threads_ * scratch]);
    const std::unique_ptr<float[]> all_sums(new float[threads_ * kTaps * tiles_.rows * kChannelBlock]);
    const std::vector<std::uint32_t> zeros(row);
    std::vector<std::vector<const std::uint32_t*>> all_places(
        threads_, std::vector<const std::uint32_t*>(4 * (2 * std::min(size, across_) + 2)));
#pragma omp parallel num_threads(static_cast<int>(threads_)) if (threads_ > 1)
    {
#if defined(_OPENMP)
      const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
      const std::size_t thread = 0;
#endif
      std::uint32_t* const own = scratches.get() + thread * scratch;
      std::vector<const std::uint32_t*>& places = all_places[thread];
      float* const sums = all_sums.get() + thread * kTaps * tiles_.rows * kChannelBlock;
#pragma omp for schedule(dynamic, 1)
      for (std::size_t i = 0; i < blocks * chunks; ++i)
        pack(i / chunks, i % chunks, own, weights.get() + i / chunks * block);
#pragma omp for schedule(dynamic, 1)
      for (std::size_t i = 0; i < parts; ++i) {
        const std::size_t begin = i * size, end = std::min(count, begin + size);
        for (std::size_t tile = begin, next; tile < end; tile = next) {
          // As many as are side by side.
          next = std::min(end, tile - tile % across_ + across_);
          spread(tile, next - tile, from, zeros.data(), places.data(), own + (tile - begin) * row, size * row);
        }
        for (std::size_t b = 0; b < blocks; ++b) {
          for (std::size_t first = begin; first < end; first += tiles_.rows)
            multiply(own + (first - begin) * row, size * row, weights.get() + b * block, sums, first,
                     std::min(tiles_.rows, end - first), to + b * kChannelBlock / tiles_.packed);
        }
      }
    }
  }

 private:
  struct Place {
    std::size_t image, y, x;
  };
  Place place(std::size_t tile) const {
    const std::size_t above = tile / across_;
    return {above / down_, above % down_, tile % across_};
  }

  void spread(std::size_t tile, std::size_t count, const std::uint32_t* from, const std::uint32_t* zeros,
              const std::uint32_t** places, std::uint32_t* to, std::size_t stride) const {
    const Place at = place(tile);
    const auto height = static_cast<std::ptrdiff_t>(from_.height), width = static_cast<std::ptrdiff_t>(from_.width);
    const std::ptrdiff_t top = static_cast<std::ptrdiff_t>(2 * at.y) - pad_h_;
    const std::ptrdiff_t left = static_cast<std::ptrdiff_t>(2 * at.x) - pad_w_;
    const auto columns = static_cast<std::ptrdiff_t>(2 * count + 2);
    for (std::ptrdiff_t y = top; y < top + 4; ++y) {
      for (std::ptrdiff_t x = left; x < left + columns; ++x) {
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        const auto line = static_cast<std::size_t>(y), column = static_cast<std::size_t>(x);
        *places++ = inside ? from + from_.at(at.image, line, column) : zeros;
      }
    }
    tiles_.spread(places - 4 * columns, count, from_.words, to, from_.words, stride);
  }

  void multiply(const std::uint32_t* spread, std::size_t stride, const std::uint32_t* weights, float* sums,
                std::size_t first, std::size_t count, std::uint32_t* to) const {
    const Tap whole{0, 0};
    const std::size_t step = tiles_.rows * kChannelBlock;
    Row rows[kChannelBlock];
    for (std::size_t t = 0; t < kTaps; ++t) {
      for (std::size_t r = 0; r < count; ++r)
        rows[r] = {spread + t * stride + r * from_.words,
                   reinterpret_cast<std::uint32_t*>(sums + t * step + r * kChannelBlock)};
      tiles_.gather_sums(rows, count, &whole, 1, from_.words, weights + t * from_.words * kChannelBlock);
    }
    for (std::size_t r = 0; r < count; ++r) {
      const Place at = place(first + r);
      std::uint32_t* places[4];
      for (std::size_t p = 0; p < 4; ++p) {
        const std::size_t y = 2 * at.y + p / 2, x = 2 * at.x + p % 2;
        const bool inside = y < to_.height && x < to_.width;
        places[p] = inside ? to + to_.at(at.image, y, x) : nullptr;
      }
      tiles_.collect(sums + r * kChannelBlock, step, places);
    }
  }

  const Tiles& tiles_;
  std::size_t images_, threads_;
  Side from_, to_;
  std::ptrdiff_t pad_h_, pad_w_;
  std::size_t down_, across_;
};

// The transform of a kernel that is turned around has its first and last rows and columns exchanged.
std::size_t turned(std::size_t tap) {
  const std::size_t exchanged[] = {3, 1, 2, 0};
  return 4 * exchanged[tap / 4] + exchanged[tap % 4];
}

}  // namespace

void check_winograd(const Windows& at) {
  if (at.kernel_h != 3 || at.kernel_w != 3 || at.stride_h != 1 || at.stride_w != 1 || std::max(at.pad_h, at.pad_w) > 2)
    throw std::invalid_argument("winograd: a kernel of 3 x 3, stride 1 and at most 2 places of padding are wanted");
}

void winograd(const void* x, const void* weights, void* y, const Convolution& of) {
  check_winograd(of.at);
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const std::size_t in = at.channels / tiles.packed, row = at.taps() * in, step = kChannelBlock / tiles.packed;
  const Winograd all(of, {at.height, at.width, in}, {at.down(), at.across(), of.out / tiles.packed},
                     static_cast<std::ptrdiff_t>(at.pad_h), static_cast<std::ptrdiff_t>(at.pad_w));
  all.run(words(x), static_cast<std::uint32_t*>(y),
          [&](std::size_t block, std::size_t chunk, std::uint32_t* scratch, std::uint32_t* to) {
            for (std::size_t o = 0; o < kChannelBlock; ++o)
              tiles.spread_kernel(words(weights) + (block * kChannelBlock + o) * row + chunk * step, in, step,
                                  scratch + o * kTaps * step);
            for (std::size_t t = 0; t < kTaps; ++t)
              tiles.transpose(scratch + t * step, kTaps * step, step, to + (t * in + chunk * step) * kChannelBlock);
          });
}

void winograd_map_gradient(const void* dy, const void* weights, void* dx, const Convolution& of) {
  check_winograd(of.at);
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const std::size_t in = at.channels / tiles.packed, row = at.taps() * in, step = kChannelBlock / tiles.packed;
  const std::size_t out = of.out / tiles.packed;
  const Winograd all(of, {at.down(), at.across(), out}, {at.height, at.width, in},
                     2 - static_cast<std::ptrdiff_t>(at.pad_h), 2 - static_cast<std::ptrdiff_t>(at.pad_w));
  all.run(words(dy), static_cast<std::uint32_t*>(dx),
          [&](std::size_t block, std::size_t chunk, std::uint32_t* scratch, std::uint32_t* to) {
            for (std::size_t o = 0; o < kChannelBlock; ++o)
              tiles.spread_kernel(words(weights) + (chunk * kChannelBlock + o) * row + block * step, in, step,
                                  scratch + o * kTaps * step);
            for (std::size_t t = 0; t < kTaps; ++t) {
              const std::uint32_t* const from = scratch + turned(t) * step;
              for (std::size_t o = 0; o < kChannelBlock; o += tiles.packed)
                tiles.join(from + o * kTaps * step, from + (o + 1) * kTaps * step,
                           to + (t * out + (chunk * kChannelBlock + o) / tiles.packed) * kChannelBlock);
            }
          });
}

}  // namespace fastmoco
