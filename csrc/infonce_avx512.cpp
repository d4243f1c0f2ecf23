#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <immintrin.h>

#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define FASTMOCO_LANES 16
#define FASTMOCO_ROWS 12
#include "infonce_sweep.h"

namespace fastmoco {

FASTMOCO_TARGET void sweep_avx512(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  sweep_with<Float32>(sweep, partial, begin, end);
}

}  // namespace fastmoco
#endif
