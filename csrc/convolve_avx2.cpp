#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#define FASTMOCO_TARGET __attribute__((target("avx2,fma")))
#define FASTMOCO_LANES 8
#define FASTMOCO_ROWS 4
#include "convolve_sweep.h"

namespace fastmoco {

const Tiles tiles_avx2 = tiles<Floats>();

}  // namespace fastmoco
#endif
