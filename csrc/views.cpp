#include "views.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "platform.h"
#include "views_axis.h"
#include "views_group.h"
#include "views_pixel.h"
#include "views_work.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <cpuid.h>
#endif

namespace fastmoco {
namespace {

struct InstructionSet {
  const char* name;
  void (*make_view)(const ViewWork&);
};

#if defined(FASTMOCO_HAS_CLONES)
// Compilers have a name for this one only lately.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

// What the processor has, from the best to the plainest.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(FASTMOCO_HAS_CLONES)
  const bool avx2 = has_avx2() && has_f16c();
  if (avx2 && has_avx512())
    sets.push_back({"avx512", make_view_avx512});
  if (avx2) sets.push_back({"avx2", make_view_avx2});
#endif
  sets.push_back({"baseline", make_view_baseline});
  return sets;
}

InstructionSet instruction_set(const char* name) {
  for (const auto& set : instruction_sets())
    if (*name == 0 || std::strcmp(set.name, name) == 0) return set;
  throw std::invalid_argument(std::string("views: this processor has not the instruction set ") + name);
}

// An array that is only ever made larger, so that a thread's views after the first find it made.
template <typename T>
class Room {
 public:
  T* of(std::size_t size) {
    if (size > size_) {
      memory_.reset();
      memory_.reset(new T[size + kAlign / sizeof(T)]);
      size_ = size;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  static constexpr std::size_t kAlign = 64;
  std::unique_ptr<T[]> memory_;
  std::size_t size_ = 0;
};

// An axis's filter as the loops want it: the same number of taps for every output pixel, as few as will do.
class FilterTable {
 public:
  Filter make(const Axis& axis) {
    const auto size = static_cast<std::size_t>(axis.size), most = static_cast<std::size_t>(most_taps(axis));
    float* const all = all_.of(size * most);
    int *const first = first_.of(size), *const count = count_.of(size);
    int taps = 1;
    for (int i = 0; i < axis.size; ++i) {
      float* const weights = all + static_cast<std::size_t>(i) * most;
      count[i] = filter(axis, i, first + i, weights, 1);
      while (count[i] > 1 && weights[count[i] - 1] == 0) --count[i];
      taps = std::max(taps, count[i]);
    }
    float* const weights = weights_.of(size * static_cast<std::size_t>(taps));
    for (int i = 0; i < axis.size; ++i) {
      float* const to = weights + static_cast<std::size_t>(i) * static_cast<std::size_t>(taps);
      // Moved left where the taps would go beyond the image.
      const int before = std::max(0, first[i] + taps - axis.source);
      std::fill_n(to, taps, 0.0f);
      std::copy_n(all + static_cast<std::size_t>(i) * most, count[i], to + before);
      first[i] -= before;
    }
    return {first, weights, taps};
  }

 private:
  Room<float> all_, weights_;
  Room<int> first_, count_;
};

// What one thread keeps from view to view.
class Worker {
 public:
  Worker(const ViewBatch& batch, InstructionSet set) : batch_(batch), set_(set) {
    size_ = static_cast<std::size_t>(batch.size);
    const std::size_t blocks = (size_ + kBlockRows - 1) / kBlockRows;
    // An odd number of blocks: rows a power of two apart would fall on the same few lines of the cache.
    pitch_ = (blocks | 1) * kBlockRows;
  }

  void make(std::size_t index) {
    const ViewRecord& view = batch_.views[index];
    ViewWork work{};
    work.image = batch_.images[view.image];
    work.view = view;
    work.rows = rows_.make(axis_of(work.image, view, batch_.size, false));
    work.columns = columns_.make(axis_of(work.image, view, batch_.size, true));
    work.size = batch_.size;
    work.pitch = pitch_;
    float* const weights = gaussian_.of(static_cast<std::size_t>(batch_.blur_kernel / 2 + 1));
    work.radius = gaussian(view.sigma, batch_.blur_kernel, weights);
    work.gaussian = weights;
    const auto radius = static_cast<std::size_t>(work.radius);
    const auto tile = static_cast<std::size_t>(std::max(kTileColumns, work.columns.taps));
    work.tile = tile_.of(3 * tile * kBlockRows);
    work.picture = picture_.of(3 * size_ * pitch_);
    work.ring = ring_.of((2 * radius + 1) * 3 * pitch_);
    work.beside = beside_.of(2 * radius);
    work.line = line_.of(pitch_ + 2 * radius);
    work.quads = quads_.of(4 * kPatch);
    work.out = batch_.out + index * 3 * size_ * size_;
    set_.make_view(work);
  }

 private:
  const ViewBatch& batch_;
  InstructionSet set_;
  std::size_t size_, pitch_;
  FilterTable rows_, columns_;
  Room<float> gaussian_, tile_, picture_, ring_, line_, quads_;
  Room<const float*> beside_;
};

}  // namespace

std::vector<std::string> views_sets() {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets()) names.emplace_back(set.name);
  return names;
}

ViewSpaceNeeded views_space(const ViewBatch& batch) {
  const int taps = room_for_taps(batch.images, batch.views, batch.count, batch.size);
  return {taps, ViewSpace(batch.count, batch.size, batch.blur_kernel, taps).bytes()};
}

void make_views(const ViewBatch& batch, int threads, const char* name) {
  const InstructionSet set = instruction_set(name);
  // Not OpenMP: its threads spin after their work, beside a training that wants the cores.
  const std::size_t team = std::min(batch.count, static_cast<std::size_t>(threads));
  std::atomic<std::size_t> next{0};
  std::vector<std::exception_ptr> failures(std::max<std::size_t>(team, 1));
  const auto work = [&](std::size_t member) {
    try {
      Worker worker(batch, set);
      for (std::size_t i = next++; i < batch.count; i = next++) worker.make(i);
    } catch (...) {
      failures[member] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::size_t member = 1; member < team; ++member) others.emplace_back(work, member);
  } catch (const std::system_error&) {
    // No more threads are to be had: those there are do the work.
  }
  work(0);
  for (auto& thread : others) thread.join();
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace fastmoco
