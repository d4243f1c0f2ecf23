#define FASTMOCO_TARGET
#define FASTMOCO_LANES 4
#include "views_sweep.h"

namespace fastmoco {

void make_view_baseline(const ViewWork& work) { make_view(work); }

}  // namespace fastmoco
