// The sweep over a part of the bank. Included once per instruction set, by a file that first defines what lanes.h asks
// for and
//   FASTMOCO_ROWS     rows of a register tile two vectors wide
// and then calls sweep_with<Products>, where Products says how a slice of the bank is multiplied.
//
// Queries lie along the lanes of a vector, so maximum, exponential and sum need no operation across lanes. Both products
// are C[m][lane] += sum_i A[m, i] B[i][lane] with A the slice of the bank: first m counts its rows and i its columns and
// B holds the queries, then the other way round and B holds the weights.

#include <algorithm>
#include <limits>

#include "infonce.h"
#include "lanes.h"

namespace fastmoco {
namespace {

constexpr int kRows = FASTMOCO_ROWS;

FASTMOCO_LOCAL Vec max(Vec a, Vec b) { return a > b ? a : b; }

// 2^x, to 2 units in the last place; what is below 2^-126 becomes that, NaN stays NaN.
FASTMOCO_LOCAL Vec exp2(Vec x) {
  const Vec least = splat(-126.0f), most = splat(128.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  // Least relative error of 1 + ... on [-1/2, 1/2]: 2e-9.
  Vec y = splat(0.00015353361594114365f);
  y = fma(y, f, splat(0.0013398874519225366f));
  y = fma(y, f, splat(0.009618437359768856f));
  y = fma(y, f, splat(0.05550332470793288f));
  y = fma(y, f, splat(0.24022647913598033f));
  y = fma(y, f, splat(0.6931472028552748f));
  y = fma(y, f, splat(1.0f));
  const IntVec exponent = ((IntVec)shifted - (IntVec)shifter + 127) << 23;
  return y * (Vec)exponent;
}

// Memory that will be wanted soon, fetched `bytes` at a time while a product keeps the arithmetic units busy: a tile reads
// its rows side by side, which the processor's own prefetching does not foresee.
struct Ahead {
  const char* at;
  std::size_t bytes;
};

template <class Step, int M, int V, bool kAdd>
FASTMOCO_LOCAL void tile(const float* a, std::size_t row, std::size_t step, const float* b, float* c,
                         std::size_t steps, Ahead ahead) {
  Vec sum[M][V];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = kAdd ? load(c + (m * V + v) * kLanes) : Vec{};
  }
  for (std::size_t i = 0; i < steps; ++i) {
    __builtin_prefetch(ahead.at + i * ahead.bytes, 0, 2);
    Vec right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load(b + (i * V + v) * kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(a[m * row + i * step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = Step::add(left, right[v], sum[m][v]);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + (m * V + v) * kLanes, sum[m][v]);
  }
}

// C (rows, V vectors) = or += A (rows, steps) B (steps, V vectors); A's element (m, i) is a[m * row + i * step].
// `ahead.bytes` is meant for one row and step.
template <class Step, int V, bool kAdd>
FASTMOCO_TARGET void multiply(const float* a, std::size_t row, std::size_t step, std::size_t rows, const float* b,
                              float* c, std::size_t steps, Ahead ahead) {
  constexpr std::size_t kTall = V == 2 ? kRows : 2 * kRows;
  constexpr std::size_t kWidth = V * kLanes;
  const auto from = [&](std::size_t m, std::size_t tall) {
    return Ahead{ahead.at + m * steps * ahead.bytes, tall * ahead.bytes};
  };
  std::size_t m = 0;
  for (; m + kTall <= rows; m += kTall)
    tile<Step, kTall, V, kAdd>(a + m * row, row, step, b, c + m * kWidth, steps, from(m, kTall));
  for (; m + 4 <= rows; m += 4) tile<Step, 4, V, kAdd>(a + m * row, row, step, b, c + m * kWidth, steps, from(m, 4));
  for (; m < rows; ++m) tile<Step, 1, V, kAdd>(a + m * row, row, step, b, c + m * kWidth, steps, from(m, 1));
}

// Turns the similarities of a slice into weights, in place, and brings the panel's maximum, total and rank up to date.
template <int V>
FASTMOCO_TARGET void weigh(const Sweep& sweep, float* logits, std::size_t rows, const float* similarity, float* maximum,
                           float* total, std::int32_t* rank, float* weighted) {
  constexpr int kWidth = V * kLanes;
  for (int v = 0; v < V; ++v) {
    float* const column = logits + v * kLanes;
    const Vec positive = load(similarity + v * kLanes);
    const Vec scale = splat(sweep.scale);
    Vec highest = load(column);
    IntVec above{};
    for (std::size_t j = 0; j < rows; ++j) {
      const Vec s = load(column + j * kWidth);
      highest = max(s, highest);
      above -= s > positive;
    }
    IntVec& counted = *reinterpret_cast<IntVec*>(rank + v * kLanes);
    counted += above;

    Vec top = load(maximum + v * kLanes);
    Vec sum = load(total + v * kLanes);
    if (!sweep.fixed_maximum) {
      const Vec higher = max(highest * scale, top);
      const Vec shrink = exp2(top - higher);
      bool grew = false;
      for (int lane = 0; lane < kLanes; ++lane) grew |= higher[lane] > top[lane];
      if (grew) {
        sum *= shrink;
        for (std::size_t i = 0; i < sweep.d; ++i) {
          float* const w = weighted + i * kWidth + v * kLanes;
          store(w, load(w) * shrink);
        }
        top = higher;
        store(maximum + v * kLanes, top);
      }
    }
    const Vec offset = -top;
    for (std::size_t j = 0; j < rows; ++j) {
      const Vec w = exp2(fma(load(column + j * kWidth), scale, offset));
      store(column + j * kWidth, w);
      sum += w;
    }
    store(total + v * kLanes, sum);
  }
}

FASTMOCO_LOCAL void leave_out(const Sweep& sweep, float* logits, std::size_t width, std::size_t panel,
                              std::size_t begin, std::size_t end) {
  const std::size_t last = std::min(panel + width, sweep.n);
  for (std::size_t i = panel; i < last; ++i) {
    for (std::size_t s = 0; s < sweep.skips; ++s) {
      const std::int64_t row = sweep.skip[i * sweep.skips + s];
      if (row >= static_cast<std::int64_t>(begin) && row < static_cast<std::int64_t>(end))
        logits[(static_cast<std::size_t>(row) - begin) * width + (i - panel)] = -std::numeric_limits<float>::infinity();
    }
  }
}

// The slice in float32: where it lies, or converted.
FASTMOCO_TARGET const float* slice_of(const Sweep& sweep, std::size_t begin, std::size_t end, float* rows) {
  const std::size_t size = (end - begin) * sweep.d;
  if (sweep.bank_dtype == BankDtype::kFloat32) return static_cast<const float*>(sweep.bank) + begin * sweep.d;
  const auto* const source = static_cast<const std::uint16_t*>(sweep.bank) + begin * sweep.d;
  if (sweep.bank_dtype == BankDtype::kBFloat16) {
    widen_bfloat16(source, rows, size);
  } else {
    widen_float16(source, rows, size);
  }
  return rows;
}

// Products in float32, of banks of any dtype.
struct Float32 {
  static constexpr std::size_t kRowsAtATime = 96;  // with d = 128 they fill L1, and both products read them

  FASTMOCO_LOCAL static Vec add(Vec left, Vec right, Vec sum) { return fma(left, right, sum); }

  FASTMOCO_LOCAL static const float* prepare(const Sweep& sweep, float* rows, std::size_t begin, std::size_t end) {
    return slice_of(sweep, begin, end, rows);
  }

  template <int V>
  FASTMOCO_LOCAL static void similarities(const Sweep& sweep, const Partial& partial, const float* rows,
                                          std::size_t panel, std::size_t size, Ahead ahead) {
    ahead.bytes /= 2;
    multiply<Float32, V, false>(rows, sweep.d, 1, size, sweep.queries + panel * sweep.d, partial.logits, sweep.d, ahead);
  }

  template <int V>
  FASTMOCO_LOCAL static void accumulate(const Sweep& sweep, const Partial& partial, const float* rows,
                                        std::size_t panel, std::size_t size, Ahead ahead) {
    // The second half of what is wanted soon: fetched in one product alone, it would come in bursts.
    ahead.at += size * sweep.d * ahead.bytes / 2;
    ahead.bytes /= 2;
    multiply<Float32, V, true>(rows, 1, sweep.d, sweep.d, partial.logits, partial.weighted + panel * sweep.d, size,
                               ahead);
  }
};

template <class Products, int V>
FASTMOCO_TARGET void take(const Sweep& sweep, const Partial& partial, const float* rows, std::size_t panel,
                          std::size_t begin, std::size_t end) {
  constexpr std::size_t kWidth = V * kLanes;
  const std::size_t d = sweep.d, size = end - begin, bytes = sweep.bank_dtype == BankDtype::kFloat32 ? 4 : 2;
  // Once a slice: the next one, or for later panels what is in the cache already.
  const Ahead ahead{static_cast<const char*>(sweep.bank) + (panel == 0 ? end : begin) * d * bytes, bytes};
  Products::template similarities<V>(sweep, partial, rows, panel, size, ahead);
  if (sweep.skips) leave_out(sweep, partial.logits, kWidth, panel, begin, end);
  weigh<V>(sweep, partial.logits, size, sweep.similarity + panel, partial.maximum + panel, partial.total + panel,
           partial.rank + panel, partial.weighted + panel * d);
  Products::template accumulate<V>(sweep, partial, rows, panel, size, ahead);
}

template <class Products>
FASTMOCO_TARGET void sweep_with(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end) {
  static_assert(Products::kRowsAtATime <= kSlice);
  for (std::size_t at = begin; at < end; at += Products::kRowsAtATime) {
    const std::size_t next = std::min(at + Products::kRowsAtATime, end);
    const float* const rows = Products::prepare(sweep, partial.rows, at, next);
    std::size_t panel = 0;
    while (panel < sweep.n) {
      if (panel_width(panel, sweep.n, kLanes) == kLanes) {
        take<Products, 1>(sweep, partial, rows, panel, at, next);
        panel += kLanes;
      } else {
        take<Products, 2>(sweep, partial, rows, panel, at, next);
        panel += 2 * kLanes;
      }
    }
  }
}

}  // namespace
}  // namespace fastmoco
