// What the CUDA part was compiled with. setup.py defines FASTMOCO_CUDA_TARGETS.

#include <cuda_runtime.h>

#include "cuda_place.h"

namespace fastmoco {

int cuda_version() { return CUDART_VERSION; }

std::string cuda_description() { return FASTMOCO_CUDA_TARGETS; }

}  // namespace fastmoco
