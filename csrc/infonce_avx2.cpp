#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <immintrin.h>

#define FASTMOCO_TARGET __attribute__((target("avx2,fma")))
#define FASTMOCO_LANES 8
#define FASTMOCO_ROWS 5
#include "infonce_sweep.h"

namespace fastmoco {

FASTMOCO_TARGET void sweep_avx2(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  sweep_with<Float32>(sweep, partial, begin, end);
}

}  // namespace fastmoco
#endif
