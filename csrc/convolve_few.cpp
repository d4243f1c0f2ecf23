#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "convolve.h"
#include "convolve_tiles.h"

namespace fastmoco {
namespace {

// The map with its padding around it, each line in whole words: a row of the kernel covers `steps` words, whose last
// may hold a number beyond it that is multiplied with 0.
class Bordered {
 public:
  Bordered(const void* map, const Windows& at, std::size_t packed)
      : map_(static_cast<const unsigned char*>(map)),
        at_(at),
        element_(4 / packed),
        line_((at.width + 2 * at.pad_w) * at.channels / packed + 2),
        lines_(at.height + 2 * at.pad_h),
        words_(new std::uint32_t[at.images * lines_ * line_]) {}

  std::size_t line() const { return line_; }
  std::size_t lines() const { return at_.images * lines_; }

  void bring(std::size_t i) const {
    const std::size_t image = i / lines_, y = i % lines_, size = at_.width * at_.channels * element_;
    auto* const to = reinterpret_cast<unsigned char*>(words_.get() + i * line_);
    if (y < at_.pad_h || y >= at_.height + at_.pad_h) {
      std::memset(to, 0, 4 * line_);
      return;
    }
    const std::size_t before = at_.pad_w * at_.channels * element_;
    std::memset(to, 0, before);
    std::memcpy(to + before, map_ + (image * at_.height + y - at_.pad_h) * size, size);
    std::memset(to + before + size, 0, 4 * line_ - before - size);
  }

  const std::uint32_t* at(std::size_t image, std::size_t y) const {
    return words_.get() + (image * lines_ + y) * line_;
  }

 private:
  const unsigned char* map_;
  Windows at_;
  std::size_t element_, line_, lines_;
  std::unique_ptr<std::uint32_t[]> words_;
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
  const std::size_t step = at.stride_w * at.channels / tiles.packed, blocks = of.out / kChannelBlock;
  const Bordered map(x, at, tiles.packed);
  const std::vector<std::uint32_t> packed = pack(weights, of, tiles.packed, steps);
  std::vector<Tap> taps;
  for (std::size_t ky = 0; ky < at.kernel_h; ++ky)
    taps.push_back({static_cast<std::ptrdiff_t>(ky * map.line()), ky * steps * kChannelBlock});
#pragma omp parallel num_threads(at.threads) if (at.threads > 1)
  {
#pragma omp for schedule(dynamic, 16)
    for (std::size_t i = 0; i < map.lines(); ++i) map.bring(i);
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < at.images * down; ++i) {
      const std::uint32_t* from = map.at(i / down, i % down * at.stride_h);
      std::uint32_t* to = static_cast<std::uint32_t*>(y) + i * across * words;
      Row rows[kChannelBlock];
      for (std::size_t column = 0; column < across; column += tiles.rows) {
        const std::size_t count = std::min(tiles.rows, across - column);
        for (std::size_t r = 0; r < count; ++r, from += step, to += words) rows[r] = {from, to};
        for (std::size_t b = 0; b < blocks; ++b) {
          tiles.gather(rows, count, taps.data(), taps.size(), steps,
                       packed.data() + b * at.kernel_h * steps * kChannelBlock);
          for (std::size_t r = 0; r < count; ++r) rows[r].to += kChannelBlock / tiles.packed;
        }
      }
    }
  }
}

}  // namespace fastmoco
