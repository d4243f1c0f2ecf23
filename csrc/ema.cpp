#include "ema.h"

#include <algorithm>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastmoco {
namespace {

// Below this a thread costs more to wake than it saves (elements; 128 KiB of float32 on each side).
constexpr std::size_t kGrain = 32768;

template <typename T>
FASTMOCO_INLINE void lerp_loop(T* __restrict k, const T* __restrict q, std::size_t size, Lerp<T> lerp) {
  for (std::size_t i = 0; i < size; ++i) k[i] = lerp(k[i], q[i]);
}

FASTMOCO_CLONES void lerp_span(float* k, const float* q, std::size_t size, Lerp<float> lerp) {
  lerp_loop(k, q, size, lerp);
}

FASTMOCO_CLONES void lerp_span(double* k, const double* q, std::size_t size, Lerp<double> lerp) {
  lerp_loop(k, q, size, lerp);
}

// The tensors are taken as one long row of elements and cut into equal parts: a part may begin and end inside a
// tensor, so the load is even however unequal the tensors are.
template <typename T>
void update(const std::vector<Pair<T>>& pairs, double momentum, int threads) {
  std::vector<std::size_t> ends;
  ends.reserve(pairs.size());
  std::size_t total = 0;
  for (const auto& pair : pairs) ends.push_back(total += pair.size);
  if (total == 0) return;

  const Lerp<T> lerp{static_cast<T>(1.0 - momentum)};
  const auto part = [&](std::size_t begin, std::size_t end) {
    auto i = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    while (begin < end) {
      const std::size_t offset = begin - (ends[i] - pairs[i].size);
      const std::size_t size = std::min(end, ends[i]) - begin;
      lerp_span(pairs[i].target + offset, pairs[i].source + offset, size, lerp);
      begin += size;
      ++i;
    }
  };

#if defined(_OPENMP)
  const std::size_t useful = (total + kGrain - 1) / kGrain;
  const int team = static_cast<int>(std::min<std::size_t>(useful, static_cast<std::size_t>(threads)));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    // The team may be smaller than asked for (inside another parallel region it is one).
    const auto count = static_cast<std::size_t>(omp_get_num_threads());
    const auto index = static_cast<std::size_t>(omp_get_thread_num());
    const std::size_t each = total / count, more = total % count;
    const std::size_t begin = index * each + std::min(index, more);
    part(begin, begin + each + (index < more ? 1 : 0));
  }
#else
  (void)threads;
  part(0, total);
#endif
}

}  // namespace

void ema_update(const std::vector<Pair<float>>& pairs, double momentum, int threads) {
  update(pairs, momentum, threads);
}

void ema_update(const std::vector<Pair<double>>& pairs, double momentum, int threads) {
  update(pairs, momentum, threads);
}

}  // namespace fastmoco
