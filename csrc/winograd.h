// Convolutions with 3 x 3 kernels of stride 1 by fewer products: Winograd's minimal filtering F(2 x 2, 3 x 3), as in
// Lavin and Gray 2016, arXiv:1509.09308,
//
//   Y = A^T ((G g G^T) * (B^T d B)) A
//
// brings 2 x 2 places of the result together from 4 x 4 of the map with 16 products, not 36, for each pair of channels.
// The products are matrix products over channels, one for each of the 16; their transforms stay in a core's caches.
#pragma once

#include <cstddef>

#include "convolve.h"

namespace fastmoco {

// Products of a tile.
constexpr std::size_t kTaps = 16;

// Throws std::invalid_argument for a kernel, stride or padding that the following do not take.
void check_winograd(const Windows& at);

// As their namesakes in csrc/convolve.h, of which they take what has a kernel of 3 x 3, stride 1 and at most 2 places of
// padding. What is multiplied is rounded to the maps' dtype once more after it is transformed: in bfloat16 a result is
// twice as far from the exact one.
void winograd(const void* x, const void* weights, void* y, const Convolution& of);
void winograd_map_gradient(const void* dy, const void* weights, void* dx, const Convolution& of);
void winograd_weight_gradient(const void* x, const void* dy, void* dweights, const Convolution& of);

}  // namespace fastmoco
