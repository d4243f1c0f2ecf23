#include "platform.h"

#if defined(FASTMOCO_HAS_AVX512BF16)
#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define FASTMOCO_LANES 16
#define FASTMOCO_ROWS 12
#include "infonce_pairs.h"

namespace fastmoco {

FASTMOCO_TARGET void sweep_avx512bf16(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  sweep_with<Pairs>(sweep, partial, begin, end);
}

}  // namespace fastmoco
#endif
