// Stands in for the *.cu files in a build without CUDA. setup.py defines FASTMOCO_CUDA_ABSENT, the reason.

#include <stdexcept>

#include "cuda_place.h"
#include "ema.h"
#include "sgd_ema.h"
#include "views.h"

namespace fastmoco {
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("fastmoco._C was built without CUDA: " FASTMOCO_CUDA_ABSENT); }

}  // namespace

int cuda_version() { return 0; }

std::string cuda_description() { return FASTMOCO_CUDA_ABSENT; }

void update(const std::vector<EmaTensor<float>>&, Ema<float>, CudaPlace) { refuse(); }
void update(const std::vector<EmaTensor<double>>&, Ema<double>, CudaPlace) { refuse(); }
void update(const std::vector<SgdEmaTensor<float>>&, SgdEma<float>, CudaPlace) { refuse(); }
void update(const std::vector<SgdEmaTensor<double>>&, SgdEma<double>, CudaPlace) { refuse(); }
void make_views(const ViewBatch&, int, void*, CudaPlace) { refuse(); }

}  // namespace fastmoco
