#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <immintrin.h>

#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define FASTMOCO_LANES 16
#include "views_sweep.h"

namespace fastmoco {

FASTMOCO_TARGET void make_view_avx512(const ViewWork& work) { make_view(work); }

}  // namespace fastmoco
#endif
