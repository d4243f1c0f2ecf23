// Exponential moving average of weights: k <- m k + (1 - m) q, over a list of tensors in one call.
#pragma once

#include <cstddef>
#include <vector>

#include "platform.h"

namespace fastmoco {

// One element, by the formula and in the precision of torch's lerp: each branch is exact at its own end of [0, 1],
// so momentum 1 keeps k and momentum 0 gives q to the last bit. Compiled without contraction to fused multiply-adds,
// so that the bits are the same on every processor and for any number of threads.
template <typename T>
struct Lerp {
  T weight;  // 1 - m

  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE T operator()(T k, T q) const {
    return weight < T(0.5) ? k + weight * (q - k) : q - (q - k) * (T(1) - weight);
  }
};

// `size` elements of target and source, both dense and in the same order in memory.
template <typename T>
struct Pair {
  T* target;
  const T* source;
  std::size_t size;
};

// Updates every target in place, on at most `threads` threads. No two tensors may overlap.
void ema_update(const std::vector<Pair<float>>& pairs, double momentum, int threads);
void ema_update(const std::vector<Pair<double>>& pairs, double momentum, int threads);

}  // namespace fastmoco
