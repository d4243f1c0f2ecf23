#include "platform.h"

#if defined(FASTMOCO_HAS_AVX512BF16)
#define FASTMOCO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define FASTMOCO_LANES 16
#define FASTMOCO_ROWS 8
// g++ 12 takes the undefined operands of its own AVX-512 headers for uses of uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "convolve_sweep.h"

namespace fastmoco {
namespace {

struct Pairs {
  static constexpr std::size_t kPacked = 2;

  FASTMOCO_LOCAL static Vec add(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  FASTMOCO_LOCAL static Wide<Pairs> widen(const std::uint32_t* from) {
    const __m512i pairs = _mm512_loadu_si512(from), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {{(Vec)_mm512_slli_epi32(pairs, 16), (Vec)_mm512_and_si512(pairs, upper)}};
  }

  FASTMOCO_LOCAL static void narrow(const Wide<Pairs>& numbers, std::uint32_t* to) {
    // The earlier of each pair in the lower half of a word, the later in the upper.
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(numbers.part[1], numbers.part[0]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
  }

  FASTMOCO_LOCAL static void store_two(Vec low, Vec high, std::uint32_t* to) {
    store(reinterpret_cast<float*>(to), (Vec)_mm512_cvtne2ps_pbh(high, low));
  }

  FASTMOCO_LOCAL static void join_block(const std::uint32_t* first, const std::uint32_t* second, std::uint32_t* to) {
    const __m512i a = first == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(first);
    const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(second);
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    const __m512i one = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i two = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, one, high));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(low, two, high));
  }
};

}  // namespace

const Tiles tiles_avx512bf16 = tiles<Pairs>();

}  // namespace fastmoco
#endif
