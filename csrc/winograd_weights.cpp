#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "convolve_tiles.h"
#include "platform.h"
#include "winograd.h"

namespace fastmoco {
namespace {

// Words of tiles that are transformed at once.
constexpr std::size_t kSteps = 48;
// Sums of this many bytes stay in a core's second cache beside those.
constexpr std::size_t kSumsNear = 512 * 1024;
// Units of work are at least so many, where there is as much: one that is held up leaves the others more of them.
constexpr std::size_t kUnits = 32;
// Words of tiles below which a unit of work would be lost in adding up the units' sums.
constexpr std::size_t kLeast = 8 * kSteps;

constexpr std::size_t kBlock = kChannelBlock, kSquare = kBlock * kBlock;

FASTMOCO_CLONES void add_square(const float* from, float* to) {
  for (std::size_t i = 0; i < kSquare; ++i) to[i] += from[i];
}

// The gradient to the transformed kernel is, for each tap, the products of the transformed map with the transformed
// gradient to the result, summed over all tiles: (16, blocks of 32 channels of the result, of the map, 32, 32).
class Sums {
 public:
  Sums(const void* x, const void* dy, const Convolution& of)
      : at_(of.at),
        tiles_(tiles_of(of)),
        x_(words(x)),
        dy_(words(dy)),
        map_{of.at.height, of.at.width, of.at.channels / tiles_.packed},
        result_{of.at.down(), of.at.across(), of.out / tiles_.packed},
        down_((of.at.down() + 1) / 2),
        across_((of.at.across() + 1) / 2),
        tiles_count_(of.at.images * down_ * across_),
        words_((tiles_count_ + tiles_.packed - 1) / tiles_.packed),
        ins_(of.at.channels / kBlock),
        outs_(of.out / kBlock),
        zeros_(std::max(map_.words, result_.words)) {
    const std::size_t whole = 4 * outs_ * ins_ * kSquare * sizeof(float);
    lines_ = 4 * whole <= kSumsNear ? 4 : 1;
    // Blocks of channels that a unit takes: of the map all, if that leaves a third as many of the result.
    const std::size_t most = kSumsNear / (4 * lines_ * kSquare * sizeof(float));
    in_step_ = std::min(ins_, std::max<std::size_t>(1, most / std::min<std::size_t>(outs_, 4)));
    out_step_ = std::min(outs_, std::max<std::size_t>(1, most / in_step_));
    const std::size_t units = 4 / lines_ * parts(outs_, out_step_) * parts(ins_, in_step_);
    chunks_ = std::max<std::size_t>(1, std::min(parts(kUnits, units), words_ / kLeast));
    units_ = units * chunks_;
    size_ = kTaps * outs_ * ins_ * kSquare;
    sums_.resize(chunks_ * size_);
  }

  std::size_t units() const { return units_; }
  std::size_t scratch() const { return 4 * lines_ * (in_step_ + out_step_) * kSteps * kBlock; }

  void add(std::size_t unit, std::uint32_t* scratch) {
    const std::size_t line = unit % (4 / lines_) * lines_, rest = unit / (4 / lines_);
    const std::size_t in = rest % parts(ins_, in_step_) * in_step_, above = rest / parts(ins_, in_step_);
    const std::size_t out = above % parts(outs_, out_step_) * out_step_, chunk = above / parts(outs_, out_step_);
    const std::size_t ins = std::min(in_step_, ins_ - in), outs = std::min(out_step_, outs_ - out);
    const std::size_t area = kSteps * kBlock;
    std::uint32_t* const results = scratch + 4 * lines_ * ins * area;
    const std::size_t end = words_ * (chunk + 1) / chunks_;
    for (std::size_t begin = words_ * chunk / chunks_; begin < end; begin += kSteps) {
      const std::size_t steps = std::min(kSteps, end - begin);
      for (std::size_t word = 0; word < steps; ++word)
        spread(begin + word, line, in, ins, out, outs, scratch + word * kBlock, results + word * kBlock);
      for (std::size_t t = 0; t < 4 * lines_; ++t) {
        for (std::size_t o = 0; o < outs; ++o) {
          for (std::size_t i = 0; i < ins; ++i) {
            const Run run{results + (t * outs + o) * area, scratch + (t * ins + i) * area, steps};
            float* const sums = at(chunk, 4 * line + t, out + o, in + i);
            for (std::size_t first = 0; first < kBlock; first += tiles_.rows)
              tiles_.reduce(&run, 1, first, sums + first * kBlock);
          }
        }
      }
    }
  }

  // The gradient to the kernel of one block of channels of either map.
  void finish(std::size_t out, std::size_t in, std::uint32_t* to) {
    for (std::size_t t = 0; t < kTaps; ++t) {
      float* const sums = at(0, t, out, in);
      for (std::size_t chunk = 1; chunk < chunks_; ++chunk) add_square(at(chunk, t, out, in), sums);
    }
    for (std::size_t r = 0; r < kBlock; ++r) {
      // Numbers that share words come apart as all the first and then all the second.
      const std::size_t each = kBlock / tiles_.packed, o = out * kBlock + r % each * tiles_.packed + r / each;
      tiles_.collect_kernel(at(0, 0, out, in) + r * kBlock, outs_ * ins_ * kSquare,
                            to + o * at_.taps() * map_.words + in * kBlock / tiles_.packed, map_.words);
    }
  }

  std::size_t outs() const { return outs_; }
  std::size_t ins() const { return ins_; }

 private:
  static std::size_t parts(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

  float* at(std::size_t chunk, std::size_t tap, std::size_t out, std::size_t in) {
    return sums_.data() + chunk * size_ + ((tap * outs_ + out) * ins_ + in) * kSquare;
  }

  const std::uint32_t* place(const std::uint32_t* map, const Side& side, std::size_t image, std::ptrdiff_t y,
                             std::ptrdiff_t x) const {
    const auto height = static_cast<std::ptrdiff_t>(side.height), width = static_cast<std::ptrdiff_t>(side.width);
    if (y < 0 || y >= height || x < 0 || x >= width) return zeros_.data();
    return map + side.at(image, static_cast<std::size_t>(y), static_cast<std::size_t>(x));
  }

  void spread(std::size_t word, std::size_t line, std::size_t in, std::size_t ins, std::size_t out, std::size_t outs,
              std::uint32_t* maps, std::uint32_t* results) const {
    const std::uint32_t *map[2 * kTaps], *result[2 * 4];
    for (std::size_t p = 0; p < tiles_.packed; ++p) {
      const std::size_t tile = word * tiles_.packed + p;
      if (tile >= tiles_count_) {
        std::fill_n(map + p * kTaps, kTaps, zeros_.data());
        std::fill_n(result + p * 4, 4, zeros_.data());
        continue;
      }
      const std::size_t image = tile / across_ / down_;
      const auto y = static_cast<std::ptrdiff_t>(2 * (tile / across_ % down_));
      const auto x = static_cast<std::ptrdiff_t>(2 * (tile % across_));
      const auto top = y - static_cast<std::ptrdiff_t>(at_.pad_h), left = x - static_cast<std::ptrdiff_t>(at_.pad_w);
      for (std::ptrdiff_t i = 0; i < 16; ++i)
        map[p * kTaps + static_cast<std::size_t>(i)] = place(x_, map_, image, top + i / 4, left + i % 4);
      for (std::ptrdiff_t i = 0; i < 4; ++i)
        result[p * 4 + static_cast<std::size_t>(i)] = place(dy_, result_, image, y + i / 2, x + i % 2);
    }
    const std::size_t area = kSteps * kBlock, step = kBlock / tiles_.packed;
    for (std::size_t i = 0; i < ins; ++i)
      tiles_.spread_tiles(map, (in + i) * step, line, lines_, maps + i * area, ins * area);
    for (std::size_t o = 0; o < outs; ++o)
      tiles_.spread_results(result, (out + o) * step, line, lines_, results + o * area, outs * area);
  }

  const Windows& at_;
  const Tiles& tiles_;
  const std::uint32_t *x_, *dy_;
  Side map_, result_;
  std::size_t down_, across_, tiles_count_, words_, ins_, outs_;
  std::vector<std::uint32_t> zeros_;
  // Of the 4 x 4 taps as many lines at once; blocks of channels at once.
  std::size_t lines_, in_step_, out_step_, chunks_, units_, size_;
  std::vector<float> sums_;
};

}  // namespace

void winograd_weight_gradient(const void* x, const void* dy, void* dweights, const Convolution& of) {
  check_winograd(of.at);
  Sums sums(x, dy, of);
  const auto threads = static_cast<std::size_t>(of.at.threads);
  const std::unique_ptr<std::uint32_t[]> scratch(new std::uint32_t[threads * sums.scratch()]);
#pragma omp parallel num_threads(of.at.threads) if (of.at.threads > 1)
  {
#if defined(_OPENMP)
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
    const std::size_t thread = 0;
#endif
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < sums.units(); ++i) sums.add(i, scratch.get() + thread * sums.scratch());
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < sums.outs() * sums.ins(); ++i)
      sums.finish(i / sums.ins(), i % sums.ins(), static_cast<std::uint32_t*>(dweights));
  }
}

}  // namespace fastmoco
