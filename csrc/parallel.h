// A list of tensors as one long row of elements, shared out evenly among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastmoco {

// Below this a thread costs more to wake than it saves (elements; 128 KiB of float32 in each operand).
constexpr std::size_t kGrain = 32768;

// Calls work(tensor, begin, end) until every element of every tensor has been in one range [begin, end). A thread's
// part may begin and end inside a tensor, so the load is even however unequal the tensors are.
template <typename Tensor, typename Work>
void share(const std::vector<Tensor>& tensors, int threads, Work work) {
  std::vector<std::size_t> ends;
  ends.reserve(tensors.size());
  std::size_t total = 0;
  for (const auto& tensor : tensors) ends.push_back(total += tensor.size);
  if (total == 0) return;

  const auto part = [&](std::size_t begin, std::size_t end) {
    auto i = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    while (begin < end) {
      const std::size_t before = ends[i] - tensors[i].size;
      const std::size_t until = std::min(end, ends[i]);
      work(tensors[i], begin - before, until - before);
      begin = until;
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

}  // namespace fastmoco
