// Products of bfloat16 pairs in tile registers: 16 rows of 64 bytes, 8,192 multiplications an instruction.
#include "platform.h"

#if defined(FASTMOCO_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>

#define FASTMOCO_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")))
#define FASTMOCO_LANES 16
#define FASTMOCO_ROWS 12
// g++ 12 takes the undefined operands of its own AVX-512 headers for uses of uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "infonce_pairs.h"

namespace fastmoco {
namespace {

// Tiles 0 to 3 are sums, 4 and 5 rows of the bank, 6 and 7 queries or weights; all of the full size.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Wants d in multiples of 32 and slices of whole tiles (32 rows); the slice is kept transposed, (d, rows / 2) pairs.
struct Tiles {
  static constexpr std::size_t kRowsAtATime = kSlice;

  FASTMOCO_LOCAL static const float* prepare(const Sweep& sweep, float* rows, std::size_t begin, std::size_t end) {
    const std::size_t d = sweep.d, pairs = (end - begin) / 2;
    const auto* const bank = static_cast<const std::uint16_t*>(sweep.bank) + begin * d;
    for (std::size_t j = 0; j < pairs; j += 16) {
      for (std::size_t c = 0; c < d; c += 16) transpose(bank + 2 * j * d + c, d, rows + c * pairs + j, pairs);
    }
    return reinterpret_cast<const float*>(bank);
  }

  template <int V>
  FASTMOCO_LOCAL static void similarities(const Sweep& sweep, const Partial& partial, const float* rows,
                                          std::size_t panel, std::size_t size, Ahead ahead) {
    const std::size_t words = sweep.d / 2;
    multiply<V, false>(rows, words, size, sweep.queries + panel * words, partial.logits, words, ahead.at);
  }

  template <int V>
  FASTMOCO_LOCAL static void accumulate(const Sweep& sweep, const Partial& partial, const float*, std::size_t panel,
                                        std::size_t size, Ahead) {
    Pairs::pair_weights<V>(partial.logits, size);
    multiply<V, true>(partial.rows, size / 2, sweep.d, partial.logits, partial.weighted + panel * sweep.d, size / 2,
                      nullptr);
  }

 private:
  // C (rows, V vectors) = or += A (rows, steps) B (steps, V vectors) of pairs; rows in multiples of 32, steps of 16.
  template <int V, bool kAdd>
  FASTMOCO_LOCAL static void multiply(const float* a, std::size_t stride, std::size_t rows, const float* b, float* c,
                                      std::size_t steps, const char* ahead) {
    constexpr std::size_t kBytes = V * 64, kTile = 16 * V * kLanes;
    for (std::size_t m = 0; m < rows; m += 32, a += 32 * stride, c += 2 * kTile) {
      if (kAdd) {
        _tile_loadd(0, c, kBytes);
        _tile_loadd(1, c + kTile, kBytes);
        if (V == 2) _tile_loadd(2, c + kLanes, kBytes);
        if (V == 2) _tile_loadd(3, c + kTile + kLanes, kBytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        if (V == 2) _tile_zero(2);
        if (V == 2) _tile_zero(3);
      }
      for (std::size_t i = 0; i < steps; i += 16) {
        if (!kAdd) {
          for (int line = 0; line < 32; ++line) __builtin_prefetch(ahead + line * 64, 0, 2);
          ahead += 32 * 64;
        }
        _tile_loadd(6, b + i * V * kLanes, kBytes);
        if (V == 2) _tile_loadd(7, b + i * V * kLanes + kLanes, kBytes);
        _tile_loadd(4, a + i, stride * 4);
        _tile_loadd(5, a + 16 * stride + i, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (V == 2) _tile_dpbf16ps(2, 4, 7);
        if (V == 2) _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, kBytes);
      _tile_stored(1, c + kTile, kBytes);
      if (V == 2) _tile_stored(2, c + kLanes, kBytes);
      if (V == 2) _tile_stored(3, c + kTile + kLanes, kBytes);
    }
  }

  // 32 rows of 16 columns (row stride `from_stride`, bfloat16) to 16 rows of 16 pairs (row stride `to_stride`, words).
  FASTMOCO_LOCAL static void transpose(const std::uint16_t* from, std::size_t from_stride, float* to,
                                       std::size_t to_stride) {
    __m512i r[16], s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const auto* const low = reinterpret_cast<const __m256i*>(from + 2 * i * from_stride);
      const auto* const high = reinterpret_cast<const __m256i*>(from + (2 * i + 1) * from_stride);
      r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(low)),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(high)), 16));
    }
    // A 16 x 16 transpose: words within pairs of rows, pairs within fours, then quarters of a register twice.
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      s[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      s[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      s[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      s[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(to + (i + 0) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
      _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0x88));
      _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
      _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(s[i + 4], s[i + 12], 0xdd));
    }
  }
};

}  // namespace

bool amx_permitted() {
  // Linux gives a process the tiles' state when it asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
  static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return permitted;
}

FASTMOCO_TARGET void sweep_amx(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  const std::size_t whole = begin + (end - begin) / 32 * 32;
  // Static: g++ 12 believes that the instruction reads 8 bytes, and might leave the others unwritten on the stack.
  static const TileConfig config;
  _tile_loadconfig(&config);
  sweep_with<Tiles>(sweep, partial, begin, whole);
  _tile_release();
  sweep_with<Pairs>(sweep, partial, whole, end);
}

}  // namespace fastmoco
#endif
