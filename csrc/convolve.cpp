#include "convolve.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "convolve_reach.h"
#include "convolve_tiles.h"

namespace fastmoco {
namespace {

// `to` <- at each of its places the products of what the taps reach in `from` with their weights. Places that the same
// taps reach are a matrix product: rows of numbers that lie a fixed way from each, times a block of weights.
class Gather {
 public:
  Gather(const Convolution& of, const Side& from, const Side& to, std::vector<Reach> down, std::vector<Reach> across)
      : tiles_(tiles_of(of)), at_(of.at), from_(from), to_(to), down_(std::move(down)), across_(std::move(across)) {
    for (const Reach& y : down_) {
      for (const Reach& x : across_) {
        Group group{&y, &x, at_.images * y.to.size() * x.to.size(), {}};
        for (std::size_t i = 0; i < y.taps.size(); ++i) {
          for (std::size_t j = 0; j < x.taps.size(); ++j) {
            const auto places = y.shifts[i] * static_cast<std::ptrdiff_t>(from.width) + x.shifts[j];
            group.taps.push_back({places * static_cast<std::ptrdiff_t>(from.words),
                                  (y.taps[i] * at_.kernel_w + x.taps[j]) * from.words * kChannelBlock});
          }
        }
        groups_.push_back(std::move(group));
      }
    }
  }

  // pack(block, tap, to) writes the weights of 32 channels of `to` for all words of `from`, (words, 32).
  template <typename Pack>
  void run(const std::uint32_t* from, std::uint32_t* to, const Pack& pack) const {
    const std::size_t slice = from_.words * kChannelBlock, block = at_.taps() * slice;
    const std::size_t blocks = to_.words * tiles_.packed / kChannelBlock, slices = blocks * at_.taps();
    const std::unique_ptr<std::uint32_t[]> weights(new std::uint32_t[blocks * block]);
    // So many blocks at a time that they stay near.
    const std::size_t near = std::max<std::size_t>(1, kNear / (4 * block)), ranges = (blocks + near - 1) / near;
    const std::vector<Part> parts = split(ranges);
    const std::size_t units = ranges * parts.size();
#pragma omp parallel num_threads(at_.threads) if (at_.threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (std::size_t i = 0; i < slices; ++i) pack(i / at_.taps(), i % at_.taps(), weights.get() + i * slice);
#pragma omp for schedule(dynamic, 1)
      for (std::size_t i = 0; i < units; ++i) {
        const std::size_t range = i / parts.size();
        multiply(parts[i % parts.size()], from, to, weights.get(), blocks * range / ranges,
                 blocks * (range + 1) / ranges);
      }
    }
  }

 private:
  struct Group {
    const Reach *down, *across;
    std::size_t rows;
    std::vector<Tap> taps;
  };
  struct Part {
    const Group* group;
    std::size_t begin, end;
  };

  std::vector<Part> split(std::size_t ranges) const {
    std::size_t rows = 0;
    for (const Group& group : groups_) rows += group.rows;
    const std::size_t even = rows * ranges / (kParts * static_cast<std::size_t>(at_.threads)) / tiles_.rows;
    const std::size_t size = std::clamp<std::size_t>(even, 2, 64) * tiles_.rows;
    std::vector<Part> parts;
    for (const Group& group : groups_) {
      for (std::size_t begin = 0; begin < group.rows; begin += size)
        parts.push_back({&group, begin, std::min(group.rows, begin + size)});
    }
    return parts;
  }

  void multiply(const Part& part, const std::uint32_t* from, std::uint32_t* to, const std::uint32_t* weights,
                std::size_t begin, std::size_t end) const {
    const std::vector<Tap>& taps = part.group->taps;
    const std::size_t block = at_.taps() * from_.words * kChannelBlock, step = kChannelBlock / tiles_.packed;
    Row rows[kChannelBlock];
    for (std::size_t row = part.begin; row < part.end; row += tiles_.rows) {
      const std::size_t count = std::min(tiles_.rows, part.end - row);
      for (std::size_t r = 0; r < count; ++r) rows[r] = place(*part.group, row + r, from, to + begin * step);
      for (std::size_t b = begin; b < end; ++b) {
        tiles_.gather(rows, count, taps.data(), taps.size(), from_.words, weights + b * block);
        for (std::size_t r = 0; r < count; ++r) rows[r].to += step;
      }
    }
  }

  Row place(const Group& group, std::size_t row, const std::uint32_t* from, std::uint32_t* to) const {
    const Reach &down = *group.down, &across = *group.across;
    const std::size_t x = row % across.to.size(), above = row / across.to.size();
    const std::size_t y = above % down.to.size(), image = above / down.to.size();
    return {from + from_.at(image, down.from[y], across.from[x]), to + to_.at(image, down.to[y], across.to[x])};
  }

  const Tiles& tiles_;
  Windows at_;
  Side from_, to_;
  std::vector<Reach> down_, across_;
  std::vector<Group> groups_;
};

}  // namespace

void convolve(const void* x, const void* weights, void* y, const Convolution& of) {
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const std::size_t in = at.channels / tiles.packed, row = at.taps() * in;
  const Gather gather(of, {at.height, at.width, in}, {at.down(), at.across(), of.out / tiles.packed},
                      reaches_of_windows(at.down(), at.height, at.kernel_h, at.stride_h, at.pad_h),
                      reaches_of_windows(at.across(), at.width, at.kernel_w, at.stride_w, at.pad_w));
  gather.run(words(x), static_cast<std::uint32_t*>(y), [&](std::size_t block, std::size_t tap, std::uint32_t* to) {
    tiles.transpose(words(weights) + block * kChannelBlock * row + tap * in, row, in, to);
  });
}

void convolve_map_gradient(const void* dy, const void* weights, void* dx, const Convolution& of) {
  const Windows& at = of.at;
  const Tiles& tiles = tiles_of(of);
  const std::size_t in = at.channels / tiles.packed, row = at.taps() * in;
  const Gather gather(of, {at.down(), at.across(), of.out / tiles.packed}, {at.height, at.width, in},
                      reaches_of_places(at.height, at.down(), at.kernel_h, at.stride_h, at.pad_h),
                      reaches_of_places(at.width, at.across(), at.kernel_w, at.stride_w, at.pad_w));
  gather.run(words(dy), static_cast<std::uint32_t*>(dx), [&](std::size_t block, std::size_t tap, std::uint32_t* to) {
    const std::uint32_t* from = words(weights) + tap * in + block * kChannelBlock / tiles.packed;
    for (std::size_t c = 0; c < of.out; c += tiles.packed, from += tiles.packed * row, to += kChannelBlock)
      tiles.join(from, from + row, to);
  });
}

}  // namespace fastmoco
