#include "sparse_decode.cuh"

#include "launch.cuh"
#include "merge_splits.cuh"

namespace tidal {

void launch_sparse_decode(const AttendParams& p, const Stream& stream) {
  const OnDevice on_device(stream);
  for_shape<true>(p, [&](auto shape) {
    using S = decltype(shape);
    launch_kernel("sparse_decode", sparse_decode_kernel<S>,
                  dim3(thread_blocks(p), p.splits, p.num_seqs), S::threads,
                  S::shared_bytes, p, stream);
  });
  launch_merge(p, stream);
}

}  // namespace tidal
