#include "ema.h"
#include "multi_tensor.cuh"

namespace fastmoco {

void update(const std::vector<EmaTensor<float>>& tensors, Ema<float> ema, CudaPlace place) {
  launch(tensors, ema, place);
}

void update(const std::vector<EmaTensor<double>>& tensors, Ema<double> ema, CudaPlace place) {
  launch(tensors, ema, place);
}

}  // namespace fastmoco
