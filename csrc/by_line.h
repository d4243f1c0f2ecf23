// The lines of a batch of maps, shared out among threads.
#pragma once

#include <algorithm>
#include <cstddef>

namespace fastmoco {

// Below this a second thread costs more to wake than it saves (bytes).
constexpr std::size_t kLineGrain = 131072;

// Calls run(image, line) for each line of each image, shared out among threads where there are many bytes.
template <typename Run>
void by_line(std::size_t images, std::size_t lines, std::size_t bytes, int threads, const Run& run) {
  if (bytes == 0) return;
  const std::size_t useful = std::min(images * lines, (bytes + kLineGrain - 1) / kLineGrain);
  [[maybe_unused]] const int team = static_cast<int>(std::min(useful, static_cast<std::size_t>(threads)));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (std::size_t i = 0; i < images * lines; ++i) run(i / lines, i % lines);
}

}  // namespace fastmoco
