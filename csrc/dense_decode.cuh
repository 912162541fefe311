// dense_decode: each row attends to all its tokens, and the lse of each selection block
// is kept where it is wanted. score_blocks: the same kernel without values, so the lse
// alone. Defined by tidal_vllm/kernels/reference. Has run under the CPU emulation only,
// not yet on a GPU.
#pragma once

#include "attend.cuh"
#include "join_warps.cuh"

namespace tidal {

// Given to attend_tiles: computes the lse of selection blocks from the scores of a warp's
// tiles, and writes it. Precondition: select_block_size is 1, 2, 4, 8 or a multiple
// of 16.
struct WriteBlockLse {
  const AttendParams& p;
  const Share& share;
  float max[2], sum[2];  // of the tiles so far of a block that is larger than a tile

  TIDAL_DEVICE void operator()(int tile, const float (&scores)[2][4], const float (&maxima)[2],
                         const float (&sums)[2], int entry) {
    if (p.block_lse == nullptr) return;
    if (p.select_block_size >= kTileTokens) {
      add_tile(tile, maxima, sums, entry);
    } else {
      write_blocks_of_tile(scores, entry);
    }
  }

  // For a selection block of one tile or more.
  TIDAL_DEVICE void add_tile(int tile, const float (&maxima)[2], const float (&sums)[2],
                       int entry) {
    const int tiles = p.select_block_size / kTileTokens;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tile % tiles == 0) {
        max[half] = kMinusInfinity;
        sum[half] = 0.f;
      }
      const float most = maxima[half] > max[half] ? maxima[half] : max[half];
      const float base = or_zero_if_empty(most);
      sum[half] = sum[half] * exp2_of(max[half] - base) +
                  sum_of_quad(sums[half]) * exp2_of(maxima[half] - base);
      max[half] = most;
    }
    if (tile % tiles != tiles - 1 && entry + kTileTokens < share.end) return;
    if (thread_index() % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write(half, entry / p.select_block_size, max[half] + log2_of(sum[half]));
    }
  }

  // For a tile of several selection blocks.
  TIDAL_DEVICE void write_blocks_of_tile(const float (&scores)[2][4], int entry) {
    const int quad = thread_index() % 4, size = p.select_block_size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, first = entry + i % 2 * 8 + quad * 2;
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
    if (head >= share.num_heads || block >= p.num_blocks) return;
    p.block_lse[share.row * p.block_lse_row_stride +
                (share.first_head + head) * p.block_lse_head_stride + block] =
        log2_sum * kLn2;
  }
};

template <class S>
TIDAL_KERNEL(S::threads, 2) dense_decode_kernel(const AttendParams p) {
  const Share share = find_share(p);
  if (!has_work(share)) return;
  const DenseEntries entries{share.seq_len};
  OnlineSoftmax<S> softmax;
  attend_tiles<S>(p, entries, share, softmax, WriteBlockLse{p, share, {}, {}});
  join_warps<S>(p, share, softmax);
}

}  // namespace tidal
