// Batch normalisation of a bfloat16 map in training, with what mostly follows it, an addition and ReLU, and its
// gradients.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmoco {

// A channels-last map as the matrix (rows, channels) that it is in memory, a row a pixel. `threads` at most are used.
struct Pixels {
  std::size_t rows, channels;
  int threads;
};

// What a forward reads beside the map, and what it leaves for the backward. Bits of bfloat16 are std::uint16_t.
struct Channels {
  const float *weight, *bias;
  float *mean, *invstd;
};

// y = act((x - mean) * invstd * weight + bias + residual), act being ReLU where `relu`; `residual` may be null.
// mean and invstd = 1 / sqrt(biased variance + epsilon) are of each channel, and written, as is the unbiased variance.
void batch_norm_forward(const std::uint16_t* x, const std::uint16_t* residual, std::uint16_t* y,
                        const Channels& channel, float* unbiased, double epsilon, bool relu, const Pixels& map);

// From dy, with g = dy where act passed something on and 0 elsewhere: dx, dweight and dbias, and where `dresidual` is
// not null g. With a residual and ReLU give both y and dresidual; with ReLU alone neither, the sign is found anew.
void batch_norm_backward(const std::uint16_t* dy, const std::uint16_t* x, const std::uint16_t* y, std::uint16_t* dx,
                         std::uint16_t* dresidual, const Channels& channel, float* dweight, float* dbias, bool relu,
                         const Pixels& map);

}  // namespace fastmoco
