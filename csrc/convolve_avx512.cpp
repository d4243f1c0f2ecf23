#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define FASTMOCO_LANES 16
#define FASTMOCO_ROWS 8
#include "convolve_sweep.h"

namespace fastmoco {

const Tiles tiles_avx512 = tiles<Floats>();

}  // namespace fastmoco
#endif
