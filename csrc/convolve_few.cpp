#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "convolve.h"
#include "convolve_tiles.h"

namespace fastmoco {
namespace {

// Lines of the result that are made at a time, from a copy of what they reach that stays near.
constexpr std::size_t kBand = 16;

// Lines of a map with its padding around them, in whole words: a row of the kernel covers `steps` words, whose last may
// hold a number beyond it that is multiplied with 0.
class Bordered {
 public:
  Bordered(const void* map, const Windows& at, std::size_t packed)
      : map_(static_cast<const unsigned char*>(map)),
        at_(at),
        element_(4 / packed),
        line_((at.width + 2 * at.pad_w) * at.channels / packed + 2) {}

  std::size_t line() const { return line_; }

  // to <- line y of the padded image.
  void bring(std::size_t image, std::size_t y, std::uint32_t* to) const {
    const std::size_t size = at_.width * at_.channels * element_, before = at_.pad_w * at_.channels * element_;
    std::memset(to, 0, 4 * line_);
    if (y < at_.pad_h || y >= at_.height + at_.pad_h) return;
    std::memcpy(reinterpret_cast<unsigned char*>(to) + before, map_ + (image * at_.height + y - at_.pad_h) * size, size);
  }

 private:
  const unsigned char* map_;
  Windows at_;
  std::size_t element_, line_;
};

// Weights in blocks of 32 channels of the result, (kernel_h, steps, 32) words each.
std::vector<std::uint32_t> pack(const void* weights, const Convolution& of, std::size_t packed, std::size_t steps) {
  const std::size_t element = 4 / packed, row = of.at.kernel_w * of.at.channels * element;
  std::vector<std::uint32_t> to(of.out * of.at.kernel_h * steps, 0);
  const auto* from = static_cast<const unsigned char*>(weights);
  for (std::size_t o = 0; o < of.out; ++o) {
    for (std::size_t y = 0; y < of.at.kernel_h; ++y, from += row) {
      const std::size_t block = (o / kChannelBlock * of.at.kernel_h + y) * steps;
      for (std::size_t k = 0; k < steps; ++k)
        std::memcpy(&to[(block + k) * kChannelBlock + o % kChannelBlock], from + 4 * k,
                    std::min<std::size_t>(4, row - 4 * k));
    }
  }
  return to;
}

}  // namespace

void convolve_few(const void* x, const void* weights, void* y, const Convolution& of) {
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const std::size_t steps = (at.kernel_w * at.channels + tiles.packed - 1) / tiles.packed;
  const std::size_t down = at.down(), across = at.across(), words = of.out / tiles.packed;
  const std::size_t step = at.stride_w * at.channels / tiles.packed, block = at.kernel_h * steps * kChannelBlock;
  const Bordered map(x, at, tiles.packed);
  const std::vector<std::uint32_t> packed = pack(weights, of, tiles.packed, steps);
  std::vector<Tap> taps;
  for (std::size_t ky = 0; ky < at.kernel_h; ++ky)
    taps.push_back({static_cast<std::ptrdiff_t>(ky * map.line()), ky * steps * kChannelBlock});
  const std::size_t bands = (down + kBand - 1) / kBand, lines = (kBand - 1) * at.stride_h + at.kernel_h;
  // Memory is asked for here: what fails within the threads ends the process.
  std::vector<std::uint32_t> copies(static_cast<std::size_t>(at.threads) * lines * map.line());
#pragma omp parallel num_threads(at.threads) if (at.threads > 1)
  {
#if defined(_OPENMP)
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
    const std::size_t thread = 0;
#endif
    std::uint32_t* const copy = copies.data() + thread * lines * map.line();
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < at.images * bands; ++i) {
      const std::size_t image = i / bands, first = i % bands * kBand, last = std::min(down, first + kBand);
      const std::size_t reached = (last - first - 1) * at.stride_h + at.kernel_h;
      for (std::size_t line = 0; line < reached; ++line)
        map.bring(image, first * at.stride_h + line, copy + line * map.line());
      for (std::size_t oy = first; oy < last; ++oy) {
        const std::uint32_t* from = copy + (oy - first) * at.stride_h * map.line();
        std::uint32_t* to = static_cast<std::uint32_t*>(y) + (image * down + oy) * across * words;
        Row rows[kChannelBlock];
        for (std::size_t column = 0; column < across; column += tiles.rows) {
          const std::size_t count = std::min(tiles.rows, across - column);
          for (std::size_t r = 0; r < count; ++r, from += step, to += words) rows[r] = {from, to};
          for (std::size_t b = 0; b < of.out / kChannelBlock; ++b) {
            tiles.gather(rows, count, taps.data(), taps.size(), steps, packed.data() + b * block);
            for (std::size_t r = 0; r < count; ++r) rows[r].to += kChannelBlock / tiles.packed;
          }
        }
      }
    }
  }
}

}  // namespace fastmoco
