// sparse_decode: each row attends to the tokens of its chosen selection blocks, which are
// gathered through the block table. Defined by tidal_vllm/kernels/reference.
#pragma once

#include "attend.cuh"
#include "join_warps.cuh"

namespace tidal {

// Given to attend_tiles, where the scores are not kept.
struct IgnoreScores {
  TIDAL_DEVICE void operator()(int, const float (&)[2][4], const float (&)[2][4],
                               const float (&)[2], const float (&)[2], int) const {}
};

// What one thread block does.
template <class S>
TIDAL_DEVICE void sparse_decode_block(const AttendParams& p) {
  const Share share = find_share(p);
  if (!has_work(share)) return;
  const int set = share.first_head / p.heads_per_set;
  const SparseEntries entries{
      p.topk_blocks + share.row * p.topk_row_stride + set * p.topk_set_stride,
      p.by_select_block_size, share.seq_len};
  OnlineSoftmax<S> softmax;
  attend_tiles<S>(p, entries, share, softmax, IgnoreScores{});
  join_warps<S>(p, share, softmax);
}

template <class S>
TIDAL_KERNEL(S::threads, S::blocks_per_processor)
sparse_decode_kernel(const AttendParams p) {
  sparse_decode_block<S>(p);
}

}  // namespace tidal
