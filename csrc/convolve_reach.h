// Which places of a kernel lie over the map, for each place of the result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "unfold.h"

namespace fastmoco {

// Places along one side that the same `taps` of a kernel bring together with a place of the other map: that of
// the first tap is `from`, one for each of `to`, and the others lie `shift` beyond it.
struct Reach {
  std::vector<std::size_t> taps;
  std::vector<std::ptrdiff_t> shifts;
  std::vector<std::size_t> to, from;
};

// The places 0 to `count` in such groups; partner(place, tap) is one of the other map, or negative for none.
template <typename Partner>
std::vector<Reach> reaches(std::size_t count, std::size_t kernel, const Partner& partner) {
  std::vector<Reach> groups;
  for (std::size_t place = 0; place < count; ++place) {
    Reach reach;
    std::ptrdiff_t first = 0;
    for (std::size_t tap = 0; tap < kernel; ++tap) {
      const std::ptrdiff_t other = partner(static_cast<std::ptrdiff_t>(place), static_cast<std::ptrdiff_t>(tap));
      if (other < 0) continue;
      if (reach.taps.empty()) first = other;
      reach.taps.push_back(tap);
      reach.shifts.push_back(other - first);
    }
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Reach& known) {
      return known.taps == reach.taps && known.shifts == reach.shifts;
    });
    if (group == groups.end()) group = groups.insert(groups.end(), reach);
    group->to.push_back(place);
    group->from.push_back(static_cast<std::size_t>(first));
  }
  return groups;
}

// From places of the result to those of the map that is convolved.
inline std::vector<Reach> reaches_of_windows(std::size_t count, std::size_t side, std::size_t kernel,
                                             std::size_t stride, std::size_t pad) {
  return reaches(count, kernel, [=](std::ptrdiff_t place, std::ptrdiff_t tap) -> std::ptrdiff_t {
    const auto other = place * static_cast<std::ptrdiff_t>(stride) + tap - static_cast<std::ptrdiff_t>(pad);
    return other < static_cast<std::ptrdiff_t>(side) ? other : -1;
  });
}

// From places of the map that is convolved to those of the result.
inline std::vector<Reach> reaches_of_places(std::size_t side, std::size_t count, std::size_t kernel,
                                            std::size_t stride, std::size_t pad) {
  return reaches(side, kernel, [=](std::ptrdiff_t place, std::ptrdiff_t tap) -> std::ptrdiff_t {
    const auto beyond = place + static_cast<std::ptrdiff_t>(pad) - tap, step = static_cast<std::ptrdiff_t>(stride);
    return beyond < 0 || beyond % step != 0 || beyond / step >= static_cast<std::ptrdiff_t>(count) ? -1 : beyond / step;
  });
}

}  // namespace fastmoco
