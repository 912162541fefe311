// dense_decode: one query token per sequence against all its tokens, keeping the lse of
// each selection block; score_blocks, the same kernel without values: the lse alone.
// Defined by tidal_vllm/kernels/reference. Has run under the CPU emulation only, not yet
// on a GPU.
#pragma once

#include "attend.cuh"

namespace tidal {

// Writes the lse of selection blocks from the scores of a warp's tiles.
// Precondition: select_block_size is 1, 2, 4, 8 or a multiple of 16.
struct BlockLse {
  const AttendParams& p;
  const Share& share;
  float top[2], sum[2];  // of the block so far, where it is larger than a tile

  TIDAL_DEVICE void operator()(int tile, const float (&scores)[2][4],
                               const float (&tops)[2], const float (&sums)[2],
                               int slot) {
    if (p.block_lse == nullptr) return;
    if (p.select_block_size >= kTileTokens) {
      add_tile(tile, tops, sums, slot);
    } else {
      write_parts(scores, slot);
    }
  }

  TIDAL_DEVICE void add_tile(int tile, const float (&tops)[2], const float (&sums)[2],
                             int slot) {
    const int tiles = p.select_block_size / kTileTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tile % tiles == 0) {
        top[half] = kMinusInfinity;
        sum[half] = 0.f;
      }
      const float most = tops[half] > top[half] ? tops[half] : top[half];
      const float base = or_zero_if_empty(most);
      sum[half] = sum[half] * exp2_of(top[half] - base) +
                  sum_of_quad(sums[half]) * exp2_of(tops[half] - base);
      top[half] = most;
    }
    if (tile % tiles != tiles - 1 && slot + kTileTokens < share.end) return;
    if (thread_index() % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write(half, slot / p.select_block_size, top[half] + log2_of(sum[half]));
    }
  }

  TIDAL_DEVICE void write_parts(const float (&scores)[2][4], int slot) {
    const int quad = thread_index() % 4, size = p.select_block_size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, first = slot + i % 2 * 8 + quad * 2;
      const float a = scores[i % 2][2 * half], b = scores[i % 2][2 * half + 1];
      if (size == 1) {
        if (first < share.end) write(half, first, a);
        if (first + 1 < share.end) write(half, first + 1, b);
        continue;
      }
      float most = a > b ? a : b;
      if (size >= 4) most = larger_of(most, shuffle_xor(most, 1));
      if (size >= 8) most = larger_of(most, shuffle_xor(most, 2));
      const float base = or_zero_if_empty(most);
      float total = exp2_of(a - base) + exp2_of(b - base);
      if (size >= 4) total += shuffle_xor(total, 1);
      if (size >= 8) total += shuffle_xor(total, 2);
      if (quad % (size / 2) == 0 && first < share.end) {
        write(half, first / size, most + log2_of(total));
      }
    }
  }

  TIDAL_DEVICE static float larger_of(float a, float b) { return a > b ? a : b; }

  TIDAL_DEVICE void write(int half, int block, float log2_sum) const {
    const int head = thread_index() % 32 / 4 + 8 * half;
    if (head >= share.heads || block >= p.num_blocks) return;
    p.block_lse[share.row * p.block_lse_row +
                (share.head + head) * p.block_lse_head + block] = log2_sum * kLn2;
  }
};

template <class S>
TIDAL_KERNEL(S::threads, 2) dense_decode_kernel(const AttendParams p) {
  const Share share = find_share(p);
  if (!has_work(share)) return;
  const DenseSlots slots{share.seq_len};
  State<S> state;
  attend_tiles<S>(p, slots, share, state, BlockLse{p, share, {}, {}});
  join_warps<S>(p, share, state);
}

}  // namespace tidal
