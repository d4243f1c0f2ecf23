#include "infonce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "pack.h"
#include "platform.h"

namespace fastmoco {
namespace {

// torch.nn.functional.normalize's.
constexpr double kNormEpsilon = 1e-12;
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
// Where no maximum has been seen: finite, so that exp2(-inf - maximum) is 0 and not NaN.
constexpr float kNoMaximum = -1e30f;

struct InstructionSet {
  const char* name;
  std::size_t pairs;  // 0, or what d must be a multiple of for its products of bfloat16
  std::size_t lanes;
  void (*sweep)(const Sweep&, const Partial&, std::size_t, std::size_t);
};

// What the processor has, from the best to the plainest.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(FASTMOCO_HAS_CLONES)
  if (has_avx512()) {
#if defined(FASTMOCO_HAS_AMX)
    if (__builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-tile") && amx_permitted())
      sets.push_back({"amx", 32, 16, sweep_amx});
#endif
    sets.push_back({"avx512", 0, 16, sweep_avx512});
#if defined(FASTMOCO_HAS_AVX512BF16)
    // Processors with tiles multiply pairs in vectors at no more than float32's rate; others, at twice that.
    if (has_avx512bf16())
      sets.insert(sets.size() == 1 ? sets.begin() : sets.end(), {"avx512bf16", 2, 16, sweep_avx512bf16});
#endif
  }
  if (has_avx2()) sets.push_back({"avx2", 0, 8, sweep_avx2});
#endif
  sets.push_back({"baseline", 0, 4, sweep_baseline});
  return sets;
}

InstructionSet instruction_set(const InfoNce& a) {
  bool reached = *a.instruction_set == 0;
  for (const auto& set : instruction_sets()) {
    reached = reached || std::strcmp(set.name, a.instruction_set) == 0;
    const bool fits = set.pairs == 0 || (a.bank_dtype == BankDtype::kBFloat16 && a.d % set.pairs == 0);
    if (reached && fits) return set;
  }
  throw std::invalid_argument(std::string("infonce: this processor has not the instruction set ") + a.instruction_set);
}

std::size_t padded(std::size_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

std::size_t partial_floats(std::size_t n, std::size_t d) {
  return padded(n) * (3 + d) + kSlice * kPanel + (kSlice * d + 15) / 16 * 16;
}

Partial partial_at(float* scratch, std::size_t n, std::size_t d) {
  const std::size_t rows = padded(n);
  float* const total = scratch + rows;
  auto* const rank = reinterpret_cast<std::int32_t*>(total + rows);
  float* const weighted = total + 2 * rows;
  float* const logits = weighted + rows * d;
  return {scratch, total, rank, weighted, logits, logits + kSlice * kPanel};
}

// The address of query i's element 0 in an array of panels; elements follow each other at the panel's width.
struct Column {
  std::size_t offset, step;
  Column(std::size_t i, std::size_t n, std::size_t d, std::size_t lanes) {
    const std::size_t start = i / (2 * lanes) * (2 * lanes);
    step = panel_width(start, n, lanes);
    offset = start * d + (i - start);
  }
};

double dot(const float* a, const float* b, std::size_t d) {
  double sum = 0;
  for (std::size_t i = 0; i < d; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double norm_of(const float* x, std::size_t d) { return std::max(std::sqrt(dot(x, x, d)), kNormEpsilon); }

// One query's sums over all parts of the bank, and what follows from them.
class Row {
 public:
  Row(const InfoNce& a, const std::vector<Partial>& parts, std::size_t i, std::size_t lanes)
      : a_(a), parts_(parts), i_(i), column_(i, a.n, a.d, lanes) {
    if (!a.normalized) {
      query_norm_ = norm_of(a.query + i * a.d, a.d);
      key_norm_ = norm_of(a.key + i * a.d, a.d);
    }
    similarity_ = dot(a.query + i * a.d, a.key + i * a.d, a.d) / (query_norm_ * key_norm_);
  }

  double similarity() const { return similarity_; }

  void pack(float* queries) const {
    const auto inverse = static_cast<float>(1 / query_norm_);
    for (std::size_t c = 0; c < a_.d; ++c)
      queries[column_.offset + c * column_.step] = a_.query[i_ * a_.d + c] * inverse;
  }

  // Writes rank, lse and gradients; returns the row's loss.
  double finish() const {
    const double positive = (similarity_ - a_.margin) / a_.temperature;
    double maximum = positive;
    for (const auto& part : parts_) maximum = std::max(maximum, part.maximum[i_] * kLn2);
    double total = std::exp(positive - maximum);
    std::int64_t rank = 0;
    for (const auto& part : parts_) {
      total += part.total[i_] * std::exp(part.maximum[i_] * kLn2 - maximum);
      rank += part.rank[i_];
    }
    const double lse = maximum + std::log(total);
    a_.rank[i_] = rank;
    a_.lse[i_] = static_cast<float>(lse);

    const double each = 1 / (a_.temperature * static_cast<double>(a_.n));
    const auto excess = static_cast<float>(std::expm1(positive - lse) * each);
    const float* const query = a_.query + i_ * a_.d;
    const float* const key = a_.key + i_ * a_.d;
    float* const dquery = a_.dquery + i_ * a_.d;
    for (std::size_t c = 0; c < a_.d; ++c) dquery[c] = excess * static_cast<float>(key[c] / key_norm_);
    for (const auto& part : parts_) {
      const auto share = static_cast<float>(std::exp(part.maximum[i_] * kLn2 - lse) * each);
      const float* const weighted = part.weighted + column_.offset;
      for (std::size_t c = 0; c < a_.d; ++c) dquery[c] += share * weighted[c * column_.step];
    }
    if (a_.dkey) {
      float* const dkey = a_.dkey + i_ * a_.d;
      for (std::size_t c = 0; c < a_.d; ++c) dkey[c] = excess * static_cast<float>(query[c] / query_norm_);
      if (!a_.normalized) through_norm(dkey, key, key_norm_);
    }
    if (!a_.normalized) through_norm(dquery, query, query_norm_);
    return lse - positive;
  }

 private:
  // The gradient to x of what has `gradient` at x / norm, norm = max(|x|, epsilon).
  void through_norm(float* gradient, const float* x, double norm) const {
    const double along = norm > kNormEpsilon ? dot(gradient, x, a_.d) / norm : 0;
    for (std::size_t c = 0; c < a_.d; ++c)
      gradient[c] = static_cast<float>((gradient[c] - x[c] / norm * along) / norm);
  }

  const InfoNce& a_;
  const std::vector<Partial>& parts_;
  std::size_t i_;
  Column column_;
  double query_norm_ = 1, key_norm_ = 1, similarity_ = 0;
};

// Panels (d, width) of float32 become panels (d / 2, width) of bfloat16 pairs, in place.
void pair_queries(float* queries, std::size_t n, std::size_t d, std::size_t lanes) {
  for (std::size_t start = 0, width = 0; start < n; start += width) {
    width = panel_width(start, n, lanes);
    for (std::size_t c = 0; c < d / 2; ++c) {
      for (std::size_t lane = 0; lane < width; ++lane) {
        const float* const from = queries + start * d + 2 * c * width + lane;
        const std::uint32_t pair = bf16_bits(from[0]) | static_cast<std::uint32_t>(bf16_bits(from[width])) << 16;
        std::memcpy(queries + start * d / 2 + c * width + lane, &pair, 4);
      }
    }
  }
}

}  // namespace

std::vector<std::string> infonce_sets() {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets()) names.emplace_back(set.name);
  return names;
}

std::size_t infonce_scratch(std::size_t n, std::size_t d, int threads) {
  return padded(n) * (d + 1) + static_cast<std::size_t>(threads) * partial_floats(n, d);
}

void infonce(const InfoNce& a) {
  const InstructionSet set = instruction_set(a);
  const std::size_t rows = padded(a.n), slices = (a.k + kSlice - 1) / kSlice;
  const auto team = std::max<std::size_t>(1, std::min<std::size_t>(slices, static_cast<std::size_t>(a.threads)));

  float* const queries = a.scratch;
  float* const similarity = queries + rows * a.d;
  std::fill(queries, similarity + rows, 0.0f);
  std::vector<Partial> parts;
  for (std::size_t t = 0; t < team; ++t) {
    float* const at = similarity + rows + t * partial_floats(a.n, a.d);
    parts.push_back(partial_at(at, a.n, a.d));
  }
  for (std::size_t i = 0; i < a.n; ++i) {
    const Row row(a, parts, i, set.lanes);
    row.pack(queries);
    similarity[i] = static_cast<float>(row.similarity());
  }
  if (set.pairs) pair_queries(queries, a.n, a.d, set.lanes);
  const double scale = kLog2E / a.temperature;
  const Sweep sweep{queries, similarity, a.bank, a.bank_dtype, a.skip, a.n, a.d, a.skips, static_cast<float>(scale),
                    a.fixed_maximum};

  const auto part = [&](std::size_t t) {
    const Partial& p = parts[t];
    std::fill(p.maximum, p.maximum + rows, a.fixed_maximum ? static_cast<float>(scale) : kNoMaximum);
    std::memset(p.total, 0, rows * (2 + a.d) * sizeof(float));
    const std::size_t begin = slices * t / team * kSlice, end = std::min(a.k, slices * (t + 1) / team * kSlice);
    if (begin < end) set.sweep(sweep, p, begin, end);
  };
  double loss = 0;
#if defined(_OPENMP)
  // Where the team is smaller than asked for (inside another parallel region it is one), a thread takes several parts.
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1) if (team > 1)
#endif
  for (std::size_t t = 0; t < team; ++t) part(t);

  for (std::size_t i = 0; i < a.n; ++i) loss += Row(a, parts, i, set.lanes).finish();
  *a.loss = static_cast<float>(loss / static_cast<double>(a.n));
}

}  // namespace fastmoco
