#include "merge_splits.cuh"

#include "launch_attend.cuh"

namespace tidal {

void launch_merge(const AttendParams& p, const Stream& stream) {
  if (p.splits == 1) return;
  const auto kernel =
      p.element == Element::kBf16 ? merge_splits_kernel<bf16> : merge_splits_kernel<fp16>;
  const dim3 grid(p.num_heads, p.num_rows);
  launch_kernel("merge_splits", kernel, grid, kMergeThreads, 0, p, stream);
}

}  // namespace tidal
