// The passes over memory of the cross-correlation loss, between the matrix products: standardisation and its gradient.
#pragma once

#include <cstddef>

#include "platform.h"

namespace fastmoco {

// (stages, batch, features) matrices, dense; every column of a stage is standardised over its batch.
struct Batches {
  std::size_t stages, batch, features;
};

// s <- r * (z - mean), r = 1 / sqrt(variance + epsilon), (stages, features), of both matrices; diagonal (stages,
// features) <- the mean of s1 * s2 over the batch. Sums of many terms are double.
void standardize(const float* z1, const float* z2, float* s1, float* s2, float* r1, float* r2, float* diagonal,
                 double epsilon, const Batches& batches, int threads);

// With d = alpha * product + weight * other, the gradient to s, writes that to z, in place of `product`:
// r * (d - s * mean(d * s)). `weight` is (stages, features). The mean of d is not subtracted, so the columns of
// `product` and `other` must sum to zero.
void through_standardize(float* product, const float* other, const float* weight, const float* s, const float* r,
                         double alpha, const Batches& batches, int threads);

}  // namespace fastmoco
