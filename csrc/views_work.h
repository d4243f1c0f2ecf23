// One view on its way through a CPU: what the loops of views_sweep.h are given, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "views.h"

namespace fastmoco {

// A thread takes this many rows, and of the image at most so many columns at a time: what both need, three colours in
// float, fits the first-level cache. A block of rows is as long as the longest vector.
constexpr int kBlockRows = 16;
constexpr int kTileColumns = 160;

// A rotation is done in blocks of so many pixels a side, each of which comes from a patch of at most so many pixels:
// the diagonal of the block, and three more on either side.
constexpr int kRotationSide = 32;
constexpr int kPatch = (kRotationSide * 3 / 2 + 6) * (kRotationSide * 3 / 2 + 6);

// The pixels that each output pixel of an axis is made of: `taps` from first[i] on, weights[i * taps] and following.
struct Filter {
  const int* first;
  const float* weights;
  int taps;
};

// `picture` is the view as it becomes, floats, columns first: value (x, c, y) is at (3 x + c) * pitch + y. Rows of it
// are padded to whole blocks, and what stands in the padding is of no account.
struct ViewWork {
  ViewImage image;
  ViewRecord view;
  Filter rows, columns;
  int size;
  std::size_t pitch;
  int radius;              // of the blur
  const float* gaussian;   // radius + 1 weights
  float* picture;
  float* tile;             // 3 columns of the image by kBlockRows, whose number is kTileColumns or columns.taps
  float* ring;             // 3 (2 radius + 1) rows of the pitch: columns blurred one way
  const float** beside;    // 2 radius columns of the ring
  float* line;             // one row of the pitch and twice the radius beyond
  float* quads;            // kPatch pixels of four floats
  std::uint16_t* out;
};

void make_view_avx512(const ViewWork& work);
void make_view_avx2(const ViewWork& work);
void make_view_baseline(const ViewWork& work);

}  // namespace fastmoco
