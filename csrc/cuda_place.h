// Where CUDA work goes, and what this build knows of CUDA. The definitions stand in *.cu, or, in a build without
// nvcc, in cuda_absent.cpp.
#pragma once

#include <cstdint>
#include <string>

namespace fastmoco {

// A device by its number and a stream by its address, which is what torch calls `cuda_stream`.
struct CudaPlace {
  int device;
  std::uintptr_t stream;
};

// The toolkit's version as CUDART_VERSION writes it (13000 for 13.0); 0 in a build without CUDA.
int cuda_version();

// What was compiled for, "sm_80 sm_90 compute_90"; in a build without CUDA, why it has none.
std::string cuda_description();

}  // namespace fastmoco
