// sparse_decode: one query token per sequence against its chosen selection blocks,
// gathered through the block table. Defined by tidal_vllm/kernels/reference. Has run
// under the CPU emulation only, not yet on a GPU.
#pragma once

#include "attend.cuh"

namespace tidal {

struct NothingKept {
  TIDAL_DEVICE void operator()(int, const float (&)[2][4], const float (&)[2],
                               const float (&)[2], int) const {}
};

template <class S>
TIDAL_KERNEL(S::threads, 2) sparse_decode_kernel(const AttendParams p) {
  const Share share = find_share(p);
  if (!has_work(share)) return;
  const int set = share.head / p.heads_per_set;
  const SparseSlots slots{count_slots(p, share.row, share.head, share.seq_len),
                          p.topk_blocks + share.row * p.topk_row + set * p.topk_set,
                          p.select_block_size, share.seq_len};
  State<S> state;
  attend_tiles<S>(p, slots, share, state, NothingKept{});
  join_warps<S>(p, share, state);
}

}  // namespace tidal
