#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <immintrin.h>

#define FASTMOCO_TARGET __attribute__((target("avx2,fma,f16c")))
#define FASTMOCO_LANES 8
#include "views_sweep.h"

namespace fastmoco {

FASTMOCO_TARGET void make_view_avx2(const ViewWork& work) { make_view(work); }

}  // namespace fastmoco
#endif
