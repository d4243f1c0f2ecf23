#include "ema.h"

#include <type_traits>

#include "parallel.h"

namespace fastmoco {
namespace {

template <typename T, typename Shadow>
FASTMOCO_INLINE void loop(EmaTensor<T> t, std::size_t begin, std::size_t end, Ema<T> ema, Shadow shadow) {
  // The caller's word that no two operands overlap is what allows vector instructions.
#pragma GCC ivdep
  for (std::size_t i = begin; i < end; ++i) ema.template update<1>(t, i, shadow);
}

template <typename T>
FASTMOCO_INLINE void span_of(const EmaTensor<T>& t, std::size_t begin, std::size_t end, Ema<T> ema) {
  if (t.shadow != nullptr) {
    loop(t, begin, end, ema, std::true_type());
  } else {
    loop(t, begin, end, ema, std::false_type());
  }
}

FASTMOCO_CLONES void span(const EmaTensor<float>& t, std::size_t begin, std::size_t end, Ema<float> ema) {
  span_of(t, begin, end, ema);
}

FASTMOCO_CLONES void span(const EmaTensor<double>& t, std::size_t begin, std::size_t end, Ema<double> ema) {
  span_of(t, begin, end, ema);
}

template <typename T>
void update_all(const std::vector<EmaTensor<T>>& tensors, Ema<T> ema, int threads) {
  share(tensors, threads, [ema](const EmaTensor<T>& t, std::size_t begin, std::size_t end) {
    span(t, begin, end, ema);
  });
}

}  // namespace

void update(const std::vector<EmaTensor<float>>& tensors, Ema<float> ema, int threads) {
  update_all(tensors, ema, threads);
}

void update(const std::vector<EmaTensor<double>>& tensors, Ema<double> ema, int threads) {
  update_all(tensors, ema, threads);
}

}  // namespace fastmoco
