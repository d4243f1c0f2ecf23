#include <type_traits>

#include "multi_tensor.cuh"
#include "views.h"
#include "views_kernels.h"

namespace fastmoco {
namespace {

// Blocks at once on a multiprocessor, for their number of registers: weights are few, and need more.
template <typename Step>
constexpr int kResident = std::is_same_v<Step, Weigh> ? 4 : 6;

template <typename Step>
__global__ void __launch_bounds__(kThreads, kResident<Step>) over_items(const ViewGroup group) {
  const std::uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item < Step::items(group)) Step::run(group, static_cast<int>(blockIdx.y), item);
}

}  // namespace

void make_views(const ViewBatch& batch, int taps, void* workspace, CudaPlace place) {
  check(cudaSetDevice(place.device));
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  const ViewSpace space(batch.count, batch.size, batch.blur_kernel, taps);
  for_each_group(batch, space, workspace, [&](const ViewGroup& group) {
    for_each_step([&](auto step) {
      using Step = decltype(step);
      const dim3 grid((Step::items(group) + kThreads - 1) / kThreads, static_cast<unsigned>(group.count));
      over_items<Step><<<grid, kThreads, 0, stream>>>(group);
      check(cudaGetLastError());
    });
  });
}

}  // namespace fastmoco
