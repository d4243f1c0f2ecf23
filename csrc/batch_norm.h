// Batch normalisation of a bfloat16 or float32 map in training, with what mostly follows it, an addition and ReLU, and
// its gradients. T is std::uint16_t, the bits of bfloat16, or float; the arithmetic is float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmoco {

// A channels-last map as the matrix (rows, channels) that it is in memory, a row a pixel. `threads` at most are used.
struct Pixels {
  std::size_t rows, channels;
  int threads;
};

// What a forward reads beside the map, and what it leaves for the backward.
struct Channels {
  const float *weight, *bias;
  float *mean, *invstd;
};

// y = act((x - mean) * invstd * weight + bias + residual), act being ReLU where `relu`; `residual` may be null.
// mean and invstd = 1 / sqrt(biased variance + epsilon) are of each channel, and written, as is the unbiased variance.
template <typename T>
void batch_norm_forward(const T* x, const T* residual, T* y, const Channels& channel, float* unbiased, double epsilon,
                        bool relu, const Pixels& map);

// From dy, with g = dy where act passed something on and 0 elsewhere: dx, dweight and dbias, and where `dresidual` is
// not null g. With a residual and ReLU give both y and dresidual; with ReLU alone neither, the sign is found anew.
template <typename T>
void batch_norm_backward(const T* dy, const T* x, const T* y, T* dx, T* dresidual, const Channels& channel,
                         float* dweight, float* dbias, bool relu, const Pixels& map);

// The running statistics of each channel go on with a batch's, by torch's lerp: running + momentum (batch's - running).
void batch_norm_track(float* running, const float* batch, float momentum, std::size_t channels);

}  // namespace fastmoco
