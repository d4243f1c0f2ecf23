// InfoNCE over a bank of negatives in one sweep: loss and gradients together, nothing of size N x K in memory.
// The formulas stand in fastmoco/ops/infonce.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastmoco {

enum class BankDtype { kFloat32, kBFloat16, kFloat16 };

// Dense row-major arrays. `query` and `key` are (n, d); `bank` is (k, d); `skip` is (n, skips), rows of the bank that
// are left out for a query, -1 for none. `dkey` may be null. `scratch` holds infonce_scratch() floats, 64-byte aligned.
struct InfoNce {
  const float* query;
  const float* key;
  const void* bank;
  BankDtype bank_dtype;
  const std::int64_t* skip;
  std::size_t n, d, k, skips;
  double temperature, margin;
  bool normalized, fixed_maximum;
  float* loss;
  std::int64_t* rank;
  float* lse;
  float* dquery;
  float* dkey;
  float* scratch;
  int threads;
  const char* instruction_set;  // the best that the processor has of those up to this one; "" for any
};

// Queries are taken in panels of this many at the most, and padded to whole panels.
constexpr std::size_t kPanel = 32;
// Rows of the bank that a thread takes at a time, at the most.
constexpr std::size_t kSlice = 192;

// What a thread keeps of its part of the bank, for all queries; each array starts on a cache line. Logarithms are to
// the base 2 here, since that is the exponential the processor is quick at.
struct Partial {
  float* maximum;      // (padded n)
  float* total;        // (padded n) sum of exp2(logit - maximum)
  std::int32_t* rank;  // (padded n)
  float* weighted;     // (padded n / panel, d, panel) the same sum, of the rows of the bank
  float* logits;       // (slice, panel)
  float* rows;         // (slice, d) the slice in float32, and what products in bfloat16 need
};

// What every thread reads. `queries` is (padded n / panel, d, panel), unit vectors; `similarity` is (padded n), theirs
// to their keys. A logit is `scale` times a similarity.
struct Sweep {
  const float* queries;
  const float* similarity;
  const void* bank;
  BankDtype bank_dtype;
  const std::int64_t* skip;
  std::size_t n, d, skips;
  float scale;
  bool fixed_maximum;
};

// The width of the panel that begins at query `start`: two vectors of `lanes`, or one for the last few queries.
inline std::size_t panel_width(std::size_t start, std::size_t n, std::size_t lanes) {
  return n - start > lanes ? 2 * lanes : lanes;
}

// The names that `instruction_set` may have on this processor, from the best to the plainest.
std::vector<std::string> infonce_sets();

std::size_t infonce_scratch(std::size_t n, std::size_t d, int threads);
void infonce(const InfoNce& arguments);

// Each takes rows begin to end of the bank, by one instruction set. The one for bfloat16 wants the bank in bfloat16,
// `d` even, and `queries` as (padded n / panel, d / 2, panel) pairs of bfloat16, 32 bits each.
// The one for AMX wants `d` in multiples of 32 besides, and amx_permitted().
void sweep_amx(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end);
bool amx_permitted();
void sweep_avx512bf16(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end);
void sweep_avx512(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end);
void sweep_avx2(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end);
void sweep_baseline(const Sweep& sweep, const Partial& partial, std::size_t begin, std::size_t end);

}  // namespace fastmoco
