#include "multi_tensor.cuh"
#include "sgd_ema.h"

namespace fastmoco {

void update(const std::vector<SgdEmaTensor<float>>& tensors, SgdEma<float> step, CudaPlace place) {
  launch(tensors, step, place);
}

void update(const std::vector<SgdEmaTensor<double>>& tensors, SgdEma<double> step, CudaPlace place) {
  launch(tensors, step, place);
}

}  // namespace fastmoco
