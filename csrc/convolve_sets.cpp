#include <cstring>
#include <stdexcept>

#include "convolve.h"
#include "convolve_tiles.h"
#include "platform.h"

namespace fastmoco {
namespace {

struct InstructionSet {
  const char* name;
  const Tiles* tiles;
};

std::vector<InstructionSet> instruction_sets([[maybe_unused]] MapDtype dtype) {
  std::vector<InstructionSet> sets;
#if defined(FASTMOCO_HAS_CLONES)
  if (dtype == MapDtype::kFloat32) {
    if (has_avx512()) sets.push_back({"avx512", &tiles_avx512});
    if (has_avx2()) sets.push_back({"avx2", &tiles_avx2});
  }
#if defined(FASTMOCO_HAS_AVX512BF16)
  if (dtype == MapDtype::kBFloat16 && has_avx512bf16()) sets.push_back({"avx512bf16", &tiles_avx512bf16});
#endif
#endif
  return sets;
}

}  // namespace

std::vector<std::string> convolve_sets(MapDtype dtype) {
  std::vector<std::string> names;
  for (const auto& set : instruction_sets(dtype)) names.emplace_back(set.name);
  return names;
}

const Tiles& tiles_of(const Convolution& of) {
  for (const auto& set : instruction_sets(of.dtype)) {
    if (std::strcmp(set.name, of.instruction_set) == 0) return *set.tiles;
  }
  throw std::invalid_argument(std::string("convolve: no instruction set \"") + of.instruction_set +
                              "\" for this dtype here");
}

}  // namespace fastmoco
