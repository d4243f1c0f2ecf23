// What the bindings share whose operations lay a kernel over maps.
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "unfold.h"

namespace fastmoco {

// (vertical, horizontal).
using Pair = std::array<std::size_t, 2>;

// A kernel over a `map` (images, height, width, channels); throws std::invalid_argument where it has no places there.
inline Windows windows(const char* operation, const std::array<std::size_t, 4>& map, const Pair& kernel,
                       const Pair& stride, const Pair& padding, int threads) {
  const std::string name(operation);
  if (kernel[0] == 0 || kernel[1] == 0 || stride[0] == 0 || stride[1] == 0)
    throw std::invalid_argument(name + ": kernel and stride must be at least 1");
  if (map[1] + 2 * padding[0] < kernel[0] || map[2] + 2 * padding[1] < kernel[1])
    throw std::invalid_argument(name + ": the kernel is larger than the padded map");
  check_threads(operation, threads);
  return {map[0],    map[1],    map[2],     map[3],     kernel[0], kernel[1],
          stride[0], stride[1], padding[0], padding[1], threads};
}

}  // namespace fastmoco
