// The cross-correlation loss of small batches and both its gradients, through Gram matrices, in two passes over the
// columns. The formulas stand in fastmoco/ops/crosscorr_forms.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastmoco {

enum class GramDtype { kFloat32, kBFloat16, kFloat16 };

// `z1` and `z2` are (stages, batch, features), dense, of `dtype`, the batch at most kGramRows; `loss` is (stages);
// `dz1` and `dz2` are float32 of z1's shape, or both null where no gradient is wanted. `scratch` holds gram_scratch()
// floats. Bits do not depend on `threads`.
struct GramLoss {
  const void* z1;
  const void* z2;
  GramDtype dtype;
  std::size_t stages, batch, features;
  double off_diagonal, scale, epsilon;
  float* loss;
  float* dz1;
  float* dz2;
  float* scratch;
  int threads;
  const char* instruction_set;  // the best that the processor has of those up to this one; "" for any
};

// Columns that lie together in scratch: a multiple of any vector.
constexpr std::size_t kPanel = 32;

// The largest batch: beyond it the products are worth a library's, and sums in float lose a digit.
constexpr std::size_t kGramRows = 128;

// What one stage's passes share. Scratch is in panels, (panels, rows, kPanel), with zeros in the rows beyond the batch
// and the columns beyond the features; `rows` is the batch rounded up to whole tiles.
struct GramStage {
  const void* z[2];
  GramDtype dtype;
  std::size_t batch, rows, features, panels;
  float epsilon;
  float* s[2];      // (panels, rows, kPanel) standardised
  float* r[2];      // (panels, kPanel) the factors that made them so
  float* diagonal;  // (panels, kPanel)
  // For the gradients: (rows, rows) symmetric, each view's, times the products' factor, less a number on the diagonal
  // and a constant: the gradient through standardisation has next to nothing of the one, lost * r * r of each column
  // itself, and nothing of the other, and what is left is smaller by sqrt(features), and so is its rounding. What
  // multiplies the other view is slope * diagonal - offset.
  const float* gram[2];
  float lost[2];
  float slope, offset;
  float* dz[2];
};

// The names that `instruction_set` may have on this processor, from the best to the plainest.
std::vector<std::string> gram_sets();

std::size_t gram_scratch(std::size_t stages, std::size_t batch, std::size_t features);
void gram_loss(const GramLoss& arguments);

// By one instruction set, for panels begin to end: standardises them and writes both views' products S S', of the
// pairs with column <= row, to gram1 and gram2 (rows, rows);
using GramPanels = void (*)(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1, float* gram2);
void gram_panels_avx512(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1, float* gram2);
void gram_panels_avx2(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1, float* gram2);
void gram_panels_baseline(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1, float* gram2);

// writes their gradients.
using GradientPanels = void (*)(const GramStage& stage, std::size_t begin, std::size_t end);
void gradient_panels_avx512(const GramStage& stage, std::size_t begin, std::size_t end);
void gradient_panels_avx2(const GramStage& stage, std::size_t begin, std::size_t end);
void gradient_panels_baseline(const GramStage& stage, std::size_t begin, std::size_t end);

}  // namespace fastmoco
