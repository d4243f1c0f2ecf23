#define FASTMOCO_TARGET
#define FASTMOCO_LANES 4
#define FASTMOCO_ROWS 5
#include "infonce_sweep.h"

namespace fastmoco {

void sweep_baseline(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  sweep_with<Float32>(sweep, partial, begin, end);
}

}  // namespace fastmoco
