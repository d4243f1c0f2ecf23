// Exponential moving average of weights: k <- m k + (1 - m) q, over a list of tensors in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_place.h"
#include "pack.h"
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

// `size` elements of target and source, dense and in the same order in memory; `shadow`, where it is not null, takes
// the target's new values as bfloat16.
template <typename T>
struct EmaTensor {
  using Element = T;
  T* target;
  const T* source;
  std::uint16_t* shadow;
  std::size_t size;

  // Every address, for a look at their common alignment.
  FASTMOCO_HOST_DEVICE std::uintptr_t addresses() const {
    return reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source) |
           reinterpret_cast<std::uintptr_t>(shadow);
  }
};

// The update of elements i to i + kWidth of a tensor. What a caller knows when it is compiled it says with
// std::true_type or std::false_type, what it does not with a bool.
template <typename T>
struct Ema {
  using Tensor = EmaTensor<T>;
  Lerp<T> lerp;

  template <int kWidth, typename Shadow>
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void update(const Tensor& t, std::size_t i, Shadow shadow) const {
    auto k = load<kWidth>(t.target + i);
    const auto q = load<kWidth>(t.source + i);
    for (int j = 0; j < kWidth; ++j) k.lane[j] = lerp(k.lane[j], q.lane[j]);
    store<kWidth>(t.target + i, k);
    if (shadow) store_bf16<kWidth>(t.shadow + i, k);
  }

  template <int kWidth>
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void update(const Tensor& t, std::size_t i) const {
    update<kWidth>(t, i, t.shadow != nullptr);
  }

  // What is read from memory once, before the first element.
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void prepare() {}
};

template <typename T>
Ema<T> make_ema(double momentum) {
  return {{static_cast<T>(1.0 - momentum)}};
}

// Updates every target in place, on at most `threads` threads or on a GPU. No two tensors may overlap.
void update(const std::vector<EmaTensor<float>>& tensors, Ema<float> ema, int threads);
void update(const std::vector<EmaTensor<double>>& tensors, Ema<double> ema, int threads);
void update(const std::vector<EmaTensor<float>>& tensors, Ema<float> ema, CudaPlace place);
void update(const std::vector<EmaTensor<double>>& tensors, Ema<double> ema, CudaPlace place);

}  // namespace fastmoco
