// Views cut from decoded images: crop, resize, colour, blur, rotation and flip in one pass over a batch. The definition
// stands in fastmoco/ops/views.py; the arithmetic of one pixel in views_pixel.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_place.h"

namespace fastmoco {

// A dense (height, width, 3) image, of uint8 where `wide` is 0 and of uint16 otherwise.
struct ViewImage {
  std::uint64_t address;
  std::int32_t height, width, wide, unused;
};

// One view; the same words as a record of fastmoco.ops.views.VIEW.
struct ViewRecord {
  std::int32_t image, resized[2], window[4], order[4];
  float factor[4], sigma, angle;
  std::int32_t gray, flip;
};
static_assert(sizeof(ViewImage) == 24 && sizeof(ViewRecord) == 76, "Python writes these");

// The places of a view's operations in `order` and `factor`.
enum : std::int32_t { kBrightness, kContrast, kSaturation, kHue };

// The longest side of a view, for its pixels to be counted in 31 bits.
constexpr int kMostSize = 32767;

// `out` is (count, size, size, 3) float16.
struct ViewBatch {
  const ViewImage* images;
  const ViewRecord* views;
  std::size_t count;
  int size, blur_kernel;
  std::uint16_t* out;
};

// The names that `instruction_set` may have on this processor, from the best to the plainest.
std::vector<std::string> views_sets();

// What a GPU needs besides: room for the weights of an output pixel, and bytes of memory on the device.
struct ViewSpaceNeeded {
  int taps;
  std::size_t bytes;
};

// `images` and `views` are on the host here.
ViewSpaceNeeded views_space(const ViewBatch& batch);

// On a GPU, where all that `batch` points to and `workspace` are. Results do not depend on how the work is cut.
void make_views(const ViewBatch& batch, int taps, void* workspace, CudaPlace place);

// On at most `threads` threads of its own, whose number changes no bit. `instruction_set`: one of views_sets(), "" for
// the best.
void make_views(const ViewBatch& batch, int threads, const char* instruction_set);

}  // namespace fastmoco
