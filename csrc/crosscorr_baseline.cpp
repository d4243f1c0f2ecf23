#define FASTMOCO_TARGET
#define FASTMOCO_LANES 4
#include "crosscorr_panels.h"

namespace fastmoco {

void gram_panels_baseline(const GramStage& stage, std::size_t begin, std::size_t end, float* gram1, float* gram2) {
  gram_panels(stage, begin, end, gram1, gram2);
}

void gradient_panels_baseline(const GramStage& stage, std::size_t begin, std::size_t end) {
  gradient_panels(stage, begin, end);
}

}  // namespace fastmoco
