#include "platform.h"

#if defined(FASTMOCO_HAS_CLONES)
#include <immintrin.h>

#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define FASTMOCO_LANES 16
#include "crosscorr_panels.h"

namespace fastmoco {

FASTMOCO_TARGET void gram_panels_avx512(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1,
                                       float* gram2) {
  gram_panels(stage, begin, end, gram1, gram2);
}

FASTMOCO_TARGET void gradient_panels_avx512(const GramStage& stage, std::size_t begin, std::size_t end) {
  gradient_panels(stage, begin, end);
}

}  // namespace fastmoco
#endif
