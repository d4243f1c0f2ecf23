#include "crosscorr_gram.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "platform.h"

namespace fastmoco {
namespace {

// Rows are rounded up to this: the taller side of a tile.
constexpr std::size_t kTile = 4;
// The Gram matrices are sums of at most this many parts, however many threads there are, of at least so many panels.
constexpr std::size_t kParts = 16, kPartPanels = 8;
// Panels whose gradients a thread takes at a time.
constexpr std::size_t kGradientPanels = 4;
// Below this a second thread costs more to wake than it saves (multiplications).
constexpr double kGrain = 2e6;

struct InstructionSet {
  const char* name;
  GramPanels gram;
  GradientPanels gradient;
};

// What the processor has, from the best to the plainest.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(FASTMOCO_HAS_CLONES)
  if (has_avx512())
    sets.push_back({"avx512", gram_panels_avx512, gradient_panels_avx512});
  if (has_avx2())
    sets.push_back({"avx2", gram_panels_avx2, gradient_panels_avx2});
#endif
  sets.push_back({"baseline", gram_panels_baseline, gradient_panels_baseline});
  return sets;
}

InstructionSet instruction_set(const char* name) {
  for (const auto& set : instruction_sets())
    if (*name == 0 || std::strcmp(set.name, name) == 0) return set;
  throw std::invalid_argument(std::string("crosscorr_gram: this processor has not the instruction set ") + name);
}

// Where a stage's scratch lies.
struct Sizes {
  std::size_t rows, panels, parts;

  Sizes(std::size_t batch, std::size_t features)
      : rows((batch + kTile - 1) / kTile * kTile),
        panels((features + kPanel - 1) / kPanel),
        parts(std::min(kParts, (panels + kPartPanels - 1) / kPartPanels)) {}

  std::size_t columns() const { return panels * kPanel; }
  std::size_t square() const { return rows * rows; }
  std::size_t floats() const { return columns() * (2 * rows + 3) + parts * 2 * square(); }
  std::size_t first_panel(std::size_t part) const { return panels * part / parts; }
};

// One stage and the parts of its Gram matrices: each part's two, one after the other.
struct Work {
  GramStage stage;
  float* gram;
};

Work work_of(const GramLoss& a, const Sizes& sizes, std::size_t index) {
  const std::size_t offset = index * a.batch * a.features, element = a.dtype == GramDtype::kFloat32 ? 4 : 2;
  float* const s = a.scratch + index * sizes.floats();
  float* const r = s + 2 * sizes.rows * sizes.columns();
  float* const gram = r + 3 * sizes.columns();
  const double factor = 2 * a.scale / static_cast<double>(a.batch);
  GramStage g{};
  g.z[0] = static_cast<const char*>(a.z1) + offset * element;
  g.z[1] = static_cast<const char*>(a.z2) + offset * element;
  g.dtype = a.dtype;
  g.batch = a.batch;
  g.rows = sizes.rows;
  g.features = a.features;
  g.panels = sizes.panels;
  g.epsilon = static_cast<float>(a.epsilon);
  for (std::size_t view = 0; view < 2; ++view) {
    g.s[view] = s + view * sizes.rows * sizes.columns();
    g.r[view] = r + view * sizes.columns();
    g.gram[view] = gram + view * sizes.square();
  }
  g.diagonal = r + 2 * sizes.columns();
  g.slope = static_cast<float>(factor * (1 - a.off_diagonal));
  g.offset = static_cast<float>(factor);
  if (a.dz1) {
    g.dz[0] = a.dz1 + offset;
    g.dz[1] = a.dz2 + offset;
  }
  return {g, gram};
}

// Scales a Gram matrix, of which the pairs with column <= row are given, and takes from it what its stage says; returns
// `lost`.
float prepare(float* gram, std::size_t batch, std::size_t rows, double factor, double epsilon) {
  double trace = 0, rest = 0;
  for (std::size_t i = 0; i < batch; ++i) {
    for (std::size_t j = 0; j < i; ++j) rest += gram[i * rows + j];
    trace += gram[i * rows + i];
  }
  const auto n = static_cast<double>(batch);
  const double off = rest / (n * (n - 1) / 2), on = trace / n - off;
  for (std::size_t i = 0; i < batch; ++i) {
    for (std::size_t j = 0; j < i; ++j)
      gram[i * rows + j] = gram[j * rows + i] = static_cast<float>((gram[i * rows + j] - off) * factor);
    gram[i * rows + i] = static_cast<float>((gram[i * rows + i] - on - off) * factor);
  }
  return static_cast<float>(on * factor * epsilon);
}

// Sums the parts of the Gram matrices into the first, in order, and makes it the stage's; returns the loss.
double finish(const GramLoss& a, const Sizes& sizes, Work& work) {
  float *const g1 = work.gram, *const g2 = g1 + sizes.square();
  for (std::size_t part = 1; part < sizes.parts; ++part) {
    const float* const more = g1 + part * 2 * sizes.square();
    for (std::size_t i = 0; i < 2 * sizes.square(); ++i) g1[i] += more[i];
  }
  double norm = 0, squares = 0, on = 0;
  for (std::size_t i = 0; i < a.batch; ++i) {
    const float *const row1 = g1 + i * sizes.rows, *const row2 = g2 + i * sizes.rows;
    for (std::size_t j = 0; j < i; ++j) norm += 2.0 * row1[j] * row2[j];
    norm += static_cast<double>(row1[i]) * row2[i];
  }
  for (std::size_t c = 0; c < a.features; ++c) {
    const double x = work.stage.diagonal[c];
    squares += x * x;
    on += (x - 1) * (x - 1);
  }
  const auto batch = static_cast<double>(a.batch);
  const double factor = 2 * a.scale * a.off_diagonal / (batch * batch);
  for (std::size_t view = 0; a.dz1 && view < 2; ++view)
    work.stage.lost[view] = prepare(view ? g2 : g1, a.batch, sizes.rows, factor, a.epsilon);
  return a.scale * (on + a.off_diagonal * (norm / (batch * batch) - squares));
}

}  // namespace

std::vector<std::string> gram_sets() {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets()) names.emplace_back(set.name);
  return names;
}

std::size_t gram_scratch(std::size_t stages, std::size_t batch, std::size_t features) {
  return stages * Sizes(batch, features).floats();
}

void gram_loss(const GramLoss& a) {
  const InstructionSet set = instruction_set(a.instruction_set);
  const Sizes sizes(a.batch, a.features);
  std::vector<Work> stages;
  for (std::size_t i = 0; i < a.stages; ++i) stages.push_back(work_of(a, sizes, i));
  const std::size_t pieces = a.dz1 ? (sizes.panels + kGradientPanels - 1) / kGradientPanels : 0;
  const double products = 3.0 * static_cast<double>(a.stages * sizes.square() * sizes.columns());
  const int team = static_cast<int>(std::min<double>(a.threads, 1 + products / kGrain));
  (void)team;

#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (std::size_t task = 0; task < a.stages * sizes.parts; ++task) {
      const Work& work = stages[task / sizes.parts];
      const std::size_t part = task % sizes.parts;
      float* const gram = work.gram + part * 2 * sizes.square();
      set.gram(work.stage, sizes.first_panel(part), sizes.first_panel(part + 1), gram, gram + sizes.square());
    }
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < a.stages; ++i) a.loss[i] = static_cast<float>(finish(a, sizes, stages[i]));
#pragma omp for schedule(static)
    for (std::size_t task = 0; task < a.stages * pieces; ++task) {
      const std::size_t begin = task % pieces * kGradientPanels;
      set.gradient(stages[task / pieces].stage, begin, std::min(sizes.panels, begin + kGradientPanels));
    }
  }
}

}  // namespace fastmoco
