// Products of bfloat16 pairs with float32 sums, for banks in bfloat16 whose rows are pairs (d even). Included after
// what infonce_sweep.h wants to be defined, with 16 lanes and AVX512-BF16 in the target.
#include <immintrin.h>

#include "infonce_sweep.h"

namespace fastmoco {
namespace {

// A number here is 32 bits that hold two bfloat16: the earlier one in the lower half.
struct Pairs {
  static constexpr std::size_t kRowsAtATime = 96;

  FASTMOCO_LOCAL static Vec add(Vec left, Vec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  // Row j of the result holds rows 2 j and 2 j + 1 of the slice, paired by column; a missing last row is zero.
  FASTMOCO_LOCAL static const float* prepare(const Sweep& sweep, float* rows, std::size_t begin, std::size_t end) {
    const std::size_t d = sweep.d;
    const auto* const bank = static_cast<const std::uint16_t*>(sweep.bank);
    auto* to = reinterpret_cast<Word*>(rows);
    for (std::size_t j = begin; j < end; j += 2, to += d) {
      const std::uint16_t *const low = bank + j * d, *const high = low + d;
      if (j + 1 < end) {
        for (std::size_t c = 0; c < d; ++c) to[c] = low[c] | static_cast<std::uint32_t>(high[c]) << 16;
      } else {
        for (std::size_t c = 0; c < d; ++c) to[c] = low[c];
      }
    }
    return reinterpret_cast<const float*>(bank + begin * d);
  }

  template <int V>
  FASTMOCO_LOCAL static void similarities(const Sweep& sweep, const Partial& partial, const float* rows,
                                          std::size_t panel, std::size_t size, Ahead ahead) {
    const std::size_t pairs = sweep.d / 2;
    ahead.bytes = 4;
    multiply<Pairs, V, false>(rows, pairs, 1, size, sweep.queries + panel * pairs, partial.logits, pairs, ahead);
  }

  template <int V>
  FASTMOCO_LOCAL static void accumulate(const Sweep& sweep, const Partial& partial, const float*, std::size_t panel,
                                        std::size_t size, Ahead ahead) {
    pair_weights<V>(partial.logits, size);
    multiply<Pairs, V, true>(partial.rows, 1, sweep.d, sweep.d, partial.logits, partial.weighted + panel * sweep.d,
                             (size + 1) / 2, Ahead{ahead.at, 0});
  }

  // Weights of two rows of the slice, side by side: in place, since a row is written after it has been read.
  template <int V>
  FASTMOCO_LOCAL static void pair_weights(float* logits, std::size_t size) {
    constexpr std::size_t kWidth = V * kLanes;
    for (std::size_t j = 0; j < size; j += 2) {
      for (std::size_t v = 0; v < V; ++v) {
        const float* const low = logits + j * kWidth + v * kLanes;
        const Vec second = j + 1 < size ? load(low + kWidth) : Vec{};
        store(logits + j / 2 * kWidth + v * kLanes, (Vec)(bfloat16(load(low)) >> 16 | bfloat16(second)));
      }
    }
  }

 private:
  typedef std::uint32_t Bits __attribute__((vector_size(64), may_alias));

  // Rounded to the nearest, ties to even, in the upper half; the lower half is zero.
  FASTMOCO_LOCAL static Bits bfloat16(Vec x) {
    const Bits bits = (Bits)x;
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  }
};

}  // namespace
}  // namespace fastmoco
