#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "convolve.h"
#include "convolve_tiles.h"

namespace fastmoco {
namespace {

// Steps of the result, in blocks of 128 bytes, that stay in the first cache while each tap passes over them.
constexpr std::size_t kSteps = 256;

// A map with the images innermost, (blocks of 32 channels, places, words of images, 32): what belongs to one weight is
// then summed along memory, and a tap is a shift by whole places. Where a word holds two images, the last of an odd
// number has zeros beside it.
class ByPlace {
 public:
  ByPlace(const void* map, const Tiles& tiles, std::size_t images, std::size_t height, std::size_t width,
          std::size_t channels)
      : map_(static_cast<const std::uint32_t*>(map)),
        tiles_(tiles),
        images_(images),
        width_(width),
        places_(height * width),
        channels_(channels),
        numbers_(new std::uint32_t[places_ * words() * channels]) {}

  std::size_t places() const { return places_; }
  std::size_t words() const { return (images_ + tiles_.packed - 1) / tiles_.packed; }

  void arrange(std::size_t place) const {
    const std::size_t pixel = channels_ / tiles_.packed, image = places_ * pixel, step = kChannelBlock / tiles_.packed;
    for (std::size_t word = 0; word < words(); ++word) {
      const std::size_t n = word * tiles_.packed;
      const std::uint32_t* const first = map_ + n * image + place * pixel;
      const std::uint32_t* const second = n + 1 < images_ ? first + image : nullptr;
      for (std::size_t b = 0; b < channels_ / kChannelBlock; ++b)
        tiles_.join(first + b * step, second == nullptr ? nullptr : second + b * step,
                    at(b, place) + word * kChannelBlock);
    }
  }

  const std::uint32_t* at(std::size_t block, std::size_t y, std::size_t x) const { return at(block, y * width_ + x); }

 private:
  std::uint32_t* at(std::size_t block, std::size_t place) const {
    return numbers_.get() + (block * places_ + place) * words() * kChannelBlock;
  }

  const std::uint32_t* map_;
  const Tiles& tiles_;
  std::size_t images_, width_, places_, channels_;
  std::unique_ptr<std::uint32_t[]> numbers_;
};

// What column kx of the kernel's row ky brings together in lines `begin` to `end` of the result, of a block of
// channels of either map. Places that are neighbours in both are one run.
void bring_together(std::vector<Run>& runs, const Windows& at, const ByPlace& result, std::size_t out,
                    const ByPlace& map, std::size_t in, std::size_t ky, std::size_t kx, std::size_t begin,
                    std::size_t end) {
  runs.clear();
  for (std::size_t oy = begin; oy < end; ++oy) {
    const std::size_t y = oy * at.stride_h + ky;
    if (y < at.pad_h || y >= at.height + at.pad_h) continue;
    for (std::size_t ox = 0; ox < at.across(); ++ox) {
      const std::size_t x = ox * at.stride_w + kx;
      if (x < at.pad_w || x >= at.width + at.pad_w) continue;
      const Run next{result.at(out, oy, ox), map.at(in, y - at.pad_h, x - at.pad_w), map.words()};
      const std::size_t length = runs.empty() ? 0 : runs.back().steps * kChannelBlock;
      if (length != 0 && runs.back().result + length == next.result && runs.back().map + length == next.map) {
        runs.back().steps += next.steps;
      } else {
        runs.push_back(next);
      }
    }
  }
}

}  // namespace

void convolve_weight_gradient(const void* x, const void* dy, void* dweights, const Convolution& of) {
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const ByPlace map(x, tiles, at.images, at.height, at.width, at.channels),
      result(dy, tiles, at.images, at.down(), at.across(), of.out);
  const std::size_t lines = std::max<std::size_t>(1, kSteps / std::max<std::size_t>(1, at.across() * map.words()));
  const std::size_t ins = at.channels / kChannelBlock, outs = of.out / kChannelBlock;
  const std::size_t units = outs * ins * at.kernel_h, places = map.places() + result.places();
  const std::size_t step = kChannelBlock / tiles.packed, in_words = at.channels / tiles.packed;
  // Each thread's sums and runs. Memory is asked for here: what fails within the threads ends the process.
  const std::size_t area = at.kernel_w * kChannelBlock * kChannelBlock;
  std::vector<float> all_sums(static_cast<std::size_t>(at.threads) * area);
  std::vector<std::vector<Run>> all_runs(static_cast<std::size_t>(at.threads));
  for (auto& runs : all_runs) runs.reserve(std::min(lines, at.down()) * at.across());
#pragma omp parallel num_threads(at.threads) if (at.threads > 1)
  {
#pragma omp for schedule(dynamic, 4)
    for (std::size_t i = 0; i < places; ++i) {
      if (i < map.places()) {
        map.arrange(i);
      } else {
        result.arrange(i - map.places());
      }
    }
#if defined(_OPENMP)
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
    const std::size_t thread = 0;
#endif
    float* const sums = all_sums.data() + thread * area;
    std::vector<Run>& runs = all_runs[thread];
    // A row of the kernel for 32 channels of each map.
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < units; ++i) {
      const std::size_t ky = i % at.kernel_h, in = i / at.kernel_h % ins, out = i / at.kernel_h / ins;
      std::fill_n(sums, area, 0.0f);
      for (std::size_t begin = 0; begin < at.down(); begin += lines) {
        for (std::size_t kx = 0; kx < at.kernel_w; ++kx) {
          bring_together(runs, at, result, out, map, in, ky, kx, begin, std::min(at.down(), begin + lines));
          for (std::size_t first = 0; first < kChannelBlock; first += tiles.rows)
            tiles.reduce(runs.data(), runs.size(), first, sums + (kx * kChannelBlock + first) * kChannelBlock);
        }
      }
      for (std::size_t r = 0; r < kChannelBlock; ++r) {
        const std::size_t row = (out * kChannelBlock + r) * at.taps() + ky * at.kernel_w;
        for (std::size_t kx = 0; kx < at.kernel_w; ++kx)
          tiles.finish(sums + (kx * kChannelBlock + r) * kChannelBlock,
                       static_cast<std::uint32_t*>(dweights) + (row + kx) * in_words + in * step);
      }
    }
  }
}

}  // namespace fastmoco
