#include "sgd_ema.h"

#include <type_traits>

#include "parallel.h"

namespace fastmoco {
namespace {

template <typename T, typename... Flags>
FASTMOCO_INLINE void loop(SgdEmaTensor<T> t, std::size_t begin, std::size_t end, const SgdEma<T>& given,
                          Flags... flags) {
  const SgdEma<T> step = given;
  // The caller's word that no two operands overlap is what allows vector instructions.
#pragma GCC ivdep
  for (std::size_t i = begin; i < end; ++i) step.template update<1>(t, i, flags...);
}

// One loop for each combination of what a tensor has and lacks, so that none is asked about within it.
template <typename T, typename Buffer, typename Copy>
FASTMOCO_INLINE void span_with(const SgdEmaTensor<T>& t, std::size_t begin, std::size_t end, const SgdEma<T>& step,
                               Buffer buffer, Copy copy) {
  if (t.shadow != nullptr) {
    loop(t, begin, end, step, buffer, std::true_type(), std::true_type(), copy);
  } else if (t.target != nullptr) {
    loop(t, begin, end, step, buffer, std::true_type(), std::false_type(), copy);
  } else {
    loop(t, begin, end, step, buffer, std::false_type(), std::false_type(), copy);
  }
}

template <typename T, typename Buffer>
FASTMOCO_INLINE void span_with(const SgdEmaTensor<T>& t, std::size_t begin, std::size_t end, const SgdEma<T>& step,
                               Buffer buffer) {
  if (t.copy != nullptr) {
    span_with(t, begin, end, step, buffer, std::true_type());
  } else {
    span_with(t, begin, end, step, buffer, std::false_type());
  }
}

template <typename T>
FASTMOCO_INLINE void span_of(const SgdEmaTensor<T>& t, std::size_t begin, std::size_t end, const SgdEma<T>& step) {
  if (t.buffer != nullptr) {
    span_with(t, begin, end, step, std::true_type());
  } else {
    span_with(t, begin, end, step, std::false_type());
  }
}

FASTMOCO_CLONES void span(const SgdEmaTensor<float>& t, std::size_t begin, std::size_t end, const SgdEma<float>& step) {
  span_of(t, begin, end, step);
}

FASTMOCO_CLONES void span(const SgdEmaTensor<double>& t, std::size_t begin, std::size_t end,
                          const SgdEma<double>& step) {
  span_of(t, begin, end, step);
}

template <typename T>
void update_all(const std::vector<SgdEmaTensor<T>>& tensors, SgdEma<T> step, int threads) {
  step.prepare();
  if (!step.blocked) {
    share(tensors, threads, [&step](const SgdEmaTensor<T>& t, std::size_t begin, std::size_t end) {
      span(t, begin, end, step);
    });
    return;
  }
  std::vector<EmaTensor<T>> averages;
  for (const auto& tensor : tensors) {
    if (tensor.target != nullptr) averages.push_back(tensor.average());
  }
  update(averages, step.ema, threads);
}

}  // namespace

void update(const std::vector<SgdEmaTensor<float>>& tensors, SgdEma<float> step, int threads) {
  update_all(tensors, step, threads);
}

void update(const std::vector<SgdEmaTensor<double>>& tensors, SgdEma<double> step, int threads) {
  update_all(tensors, step, threads);
}

}  // namespace fastmoco
