// One step of SGD and, in the same pass over memory, the moving average of the parameters it gives:
//   g += weight_decay * p;  b = momentum * b + g;  p -= lr * b;  target = lerp(target, p, 1 - ema)
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_place.h"
#include "ema.h"
#include "pack.h"
#include "platform.h"

namespace fastmoco {

// One element of SGD, in the order of operations of torch.optim.SGD.
template <typename T>
struct Sgd {
  T lr, momentum, weight_decay;

  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE T decayed(T g, T p) const { return g + weight_decay * p; }
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE T accumulated(T b, T g) const { return momentum * b + g; }
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE T moved(T p, T b) const { return p - lr * b; }
};

// `size` elements of each, dense and in the same order in memory. Where it is null: without `buffer` SGD has no
// momentum, without `target` there is no average, and without `shadow` (which needs a target) no bfloat16 of it. Where
// `copy` is not null training goes through it: it takes the new parameter in bfloat16, as the gradient is.
template <typename T>
struct SgdEmaTensor {
  using Element = T;
  T* parameter;
  const void* gradient;
  T* buffer;
  T* target;
  std::uint16_t* shadow;
  std::uint16_t* copy;
  std::size_t size;

  // Every address, for a look at their common alignment.
  FASTMOCO_HOST_DEVICE std::uintptr_t addresses() const {
    return reinterpret_cast<std::uintptr_t>(parameter) | reinterpret_cast<std::uintptr_t>(gradient) |
           reinterpret_cast<std::uintptr_t>(buffer) | reinterpret_cast<std::uintptr_t>(target) |
           reinterpret_cast<std::uintptr_t>(shadow) | reinterpret_cast<std::uintptr_t>(copy);
  }

  FASTMOCO_HOST_DEVICE EmaTensor<T> average() const { return {target, parameter, shadow, size}; }
};

// The update of elements i to i + kWidth of a tensor; the flags as in Ema.
template <typename T>
struct SgdEma {
  using Tensor = SgdEmaTensor<T>;
  Sgd<T> sgd;
  Ema<T> ema;
  // Where it is not null and holds 1, parameters and buffers stay as they are; read once, by `prepare`.
  const float* found_inf;
  bool blocked;

  template <int kWidth, typename Buffer, typename Target, typename Shadow, typename Copy>
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void update(const Tensor& t, std::size_t i, Buffer buffer, Target target,
                                                   Shadow shadow, Copy copy) const {
    auto p = load<kWidth>(t.parameter + i);
    auto g = copy ? load_bf16<T, kWidth>(static_cast<const std::uint16_t*>(t.gradient) + i)
                  : load<kWidth>(static_cast<const T*>(t.gradient) + i);
    for (int j = 0; j < kWidth; ++j) g.lane[j] = sgd.decayed(g.lane[j], p.lane[j]);
    if (buffer) {
      const auto b = load<kWidth>(t.buffer + i);
      for (int j = 0; j < kWidth; ++j) g.lane[j] = sgd.accumulated(b.lane[j], g.lane[j]);
      store<kWidth>(t.buffer + i, g);
    }
    for (int j = 0; j < kWidth; ++j) p.lane[j] = sgd.moved(p.lane[j], g.lane[j]);
    store<kWidth>(t.parameter + i, p);
    if (copy) store_bf16<kWidth>(t.copy + i, p);
    if (target) {
      auto k = load<kWidth>(t.target + i);
      for (int j = 0; j < kWidth; ++j) k.lane[j] = ema.lerp(k.lane[j], p.lane[j]);
      store<kWidth>(t.target + i, k);
      if (shadow) store_bf16<kWidth>(t.shadow + i, k);
    }
  }

  template <int kWidth>
  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void update(const Tensor& t, std::size_t i) const {
    if (!blocked) {
      update<kWidth>(t, i, t.buffer != nullptr, t.target != nullptr, t.shadow != nullptr,
                     t.copy != nullptr);
    } else if (t.target != nullptr) {
      ema.template update<kWidth>(t.average(), i);
    }
  }

  FASTMOCO_HOST_DEVICE FASTMOCO_INLINE void prepare() { blocked = found_inf != nullptr && *found_inf == 1.0f; }
};

// Updates every tensor in place, on at most `threads` threads or on a GPU. No two tensors may overlap.
void update(const std::vector<SgdEmaTensor<float>>& tensors, SgdEma<float> step, int threads);
void update(const std::vector<SgdEmaTensor<double>>& tensors, SgdEma<double> step, int threads);
void update(const std::vector<SgdEmaTensor<float>>& tensors, SgdEma<float> step, CudaPlace place);
void update(const std::vector<SgdEmaTensor<double>>& tensors, SgdEma<double> step, CudaPlace place);

}  // namespace fastmoco
