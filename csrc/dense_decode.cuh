// dense_decode: each row attends to all its tokens, and the lse of each selection block
// is kept where it is wanted. score_blocks: the same kernel without values, so the lse
// alone. Defined by tidal_vllm/kernels/reference.
#pragma once

#include "attend.cuh"
#include "join_warps.cuh"

namespace tidal {

// Given to attend_tiles: computes the lse of selection blocks from the scores of a warp's
// tiles, and writes it. Precondition: select_block_size is 1, 2, 4, 8 or a multiple
// of 16.
//
// A store into part of a sector, 32 bytes of L2, costs as much as one of the whole. So the
// lanes of a head gather neighbours, which they write at once.
struct WriteBlockLse {
  const AttendParams& p;
  const Share& share;
  float* line;     // of head lane / 4; null: not wanted
  int num_blocks;  // one behind the last that this split may write
  bool in_pairs;   // whether `line` may be written eight bytes at a time
  // Of each half of the heads: maximum and sum so far of a block that is larger than a
  // tile; else what waits to be written with a later tile.
  float kept[2][2] = {};

  TIDAL_DEVICE WriteBlockLse(const AttendParams& p, const Share& share)
      : p(p), share(share), line(p.block_lse) {
    if (line == nullptr) return;
    line += share.row * p.block_lse_row_stride +
            (share.first_head + thread_index() % 32 / 4) * p.block_lse_head_stride;
    in_pairs = reinterpret_cast<uintptr_t>(line) % 8 == 0;
    const int last = p.by_select_block_size.quotient(larger(share.end, 1) - 1);
    num_blocks = smaller(p.num_blocks, last + 1);
  }

  TIDAL_DEVICE void operator()(int tile, const float (&scores)[2][4],
                               const float (&weights)[2][4], const float (&maxima)[2],
                               const float (&sums)[2], int entry) {
    if (line == nullptr) return;
    if (p.select_block_size > kTileTokens) {
      add_tile(tile, maxima, sums, entry);
    } else if (p.select_block_size == kTileTokens) {
      gather_tile(tile, maxima, sums, entry);
    } else if (p.select_block_size == 1) {
      write_tokens(scores, entry);
    } else {
      write_blocks_of_tile(tile, scores, weights, maxima, entry);
    }
    sync_warp();  // the lanes parted, and mma needs all of them
  }

  // For selection blocks of one tile. The lanes of a head write a run of tiles at once.
  TIDAL_DEVICE void gather_tile(int tile, const float (&maxima)[2], const float (&sums)[2],
                                int entry) {
    static_assert(kRunTiles == 4);  // as many as a head has lanes
    const int in_run = tile % kRunTiles, quad = thread_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0 && share.num_heads <= 8) break;
      const float of_tile = sum_of_quad(sums[half]);
      kept[half][0] = quad == in_run ? maxima[half] : kept[half][0];
      kept[half][1] = quad == in_run ? of_tile : kept[half][1];
    }
    if (!last_of(kRunTiles, tile, entry) || quad > in_run) return;
    const int block = p.by_select_block_size.quotient(entry) - in_run + quad;
    for (int half = 0; half < 2; ++half) {
      write(half, block, kept[half][0] + log2_of(kept[half][1]));
    }
  }

  // For a selection block of more than one tile.
  TIDAL_DEVICE void add_tile(int tile, const float (&maxima)[2], const float (&sums)[2],
                             int entry) {
    const int in_block = tile - p.by_grain_tiles.quotient(tile) * p.by_grain_tiles.value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0 && share.num_heads <= 8) break;
      const float of_tile = sum_of_quad(sums[half]);
      const float most =
          in_block == 0 ? maxima[half] : larger_of(maxima[half], kept[half][0]);
      const float base = or_zero_if_empty(most);
      const float before =
          in_block == 0 ? 0.f : kept[half][1] * exp2_of(kept[half][0] - base);
      kept[half][1] = before + of_tile * exp2_of(maxima[half] - base);
      kept[half][0] = most;
    }
    const bool block_ends = in_block == p.by_grain_tiles.value - 1;
    if (!block_ends && entry + kTileTokens < share.end) return;
    if (thread_index() % 4 != 0) return;
    const int block = p.by_select_block_size.quotient(entry);
    for (int half = 0; half < 2; ++half) {
      write(half, block, kept[half][0] + log2_of(kept[half][1]));
    }
  }

  // For selection blocks of one token. Their numbers are those of the entries.
  TIDAL_DEVICE void write_tokens(const float (&scores)[2][4], int entry) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        write_pair(half, entry + i * 8 + thread_index() % 4 * 2, scores[i][2 * half],
                   scores[i][2 * half + 1]);
      }
    }
  }

  // For selection blocks of 2, 4 or 8 tokens. A lane holds two tokens of each half of the
  // tile; `sums` are over those that are in one block.
  TIDAL_DEVICE void write_blocks_of_tile(int tile, const float (&scores)[2][4],
                                         const float (&weights)[2][4],
                                         const float (&maxima)[2], int entry) {
    const int size = p.select_block_size, quad = thread_index() % 4;
    const int first = p.by_select_block_size.quotient(entry);
    const bool odd = quad % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0 && share.num_heads <= 8) break;
      float sums[2], bases[2] = {maxima[half], maxima[half]};
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] = weights[i][2 * half] + weights[i][2 * half + 1];
      // Where a block may weigh too little beside its tile, it gets a maximum of its own.
      if (ballot(sums[0] < kLeastSum || sums[1] < kLeastSum)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float a = scores[i][2 * half], b = scores[i][2 * half + 1];
          bases[i] = larger_of(a, b);
          if (size >= 4) bases[i] = larger_of(bases[i], shuffle_xor(bases[i], 1));
          if (size >= 8) bases[i] = larger_of(bases[i], shuffle_xor(bases[i], 2));
          const float base = or_zero_if_empty(bases[i]);
          sums[i] = exp2_of(a - base) + exp2_of(b - base);
        }
      }
      if (size == 2) {
        const float low = bases[0] + log2_of(sums[0]), high = bases[1] + log2_of(sums[1]);
        const float other = shuffle_xor(odd ? low : high, 1);
        write_pair(half, first + odd * 4 + quad / 2 * 2, odd ? other : low,
                   odd ? high : other);
        continue;
      }
      // A pair of lanes shares the blocks of 4 of both halves: the even lane goes on with
      // the first half, the odd one with the second.
      float total = odd ? sums[1] : sums[0];
      total += shuffle_xor(odd ? sums[0] : sums[1], 1);
      if (size == 8) total += shuffle_xor(total, 2);
      const float log2_sum = (odd ? bases[1] : bases[0]) + log2_of(total);
      if (size == 4) {
        gather_fours(half, tile, entry, first, log2_sum);
      } else {
        gather_eights(half, tile, entry, first, log2_sum);
      }
    }
  }

  // For blocks of 4. The lanes of a head hold blocks 0, 2, 1, 3 of a tile, and write those
  // of two tiles at once.
  TIDAL_DEVICE void gather_fours(int half, int tile, int entry, int first, float log2_sum) {
    const int quad = thread_index() % 4;
    if (tile % 2 == 0) {
      kept[half][0] = log2_sum;
      if (last_of(2, tile, entry)) write(half, first + quad % 2 * 2 + quad / 2, log2_sum);
      return;
    }
    const bool later = quad / 2;
    const float other = shuffle_xor(later ? kept[half][0] : log2_sum, 2);
    write_pair(half, first - 4 + 2 * quad, later ? other : kept[half][0],
               later ? log2_sum : other);
  }

  // For blocks of 8. The even lanes of a head hold the first block of a tile, the odd ones
  // the second. They write those of a run of tiles at once.
  TIDAL_DEVICE void gather_eights(int half, int tile, int entry, int first,
                                  float log2_sum) {
    const int in_run = tile % kRunTiles, quad = thread_index() % 4;
    const float other = shuffle_xor(log2_sum, 1);
    if (quad == in_run) {
      kept[half][0] = quad % 2 ? other : log2_sum;
      kept[half][1] = quad % 2 ? log2_sum : other;
    }
    if (!last_of(kRunTiles, tile, entry) || quad > in_run) return;
    write_pair(half, first + 2 * (quad - in_run), kept[half][0], kept[half][1]);
  }

  // Whether a tile is the last of `tiles`, consecutive ones, or of the split.
  TIDAL_DEVICE bool last_of(int tiles, int tile, int entry) const {
    return tile % tiles == tiles - 1 || entry + kTileTokens >= share.end;
  }

  // Smaller sums of weights may have lost what fp32 cannot hold.
  static constexpr float kLeastSum = 0x1p-100f;

  TIDAL_DEVICE bool may_write(int half, int block) const {
    return thread_index() % 32 / 4 + 8 * half < share.num_heads && block < num_blocks;
  }

  TIDAL_DEVICE void write(int half, int block, float log2_sum) const {
    if (!may_write(half, block)) return;
    store_score(line + 8 * half * p.block_lse_head_stride + block, log2_sum * kLn2);
  }

  // Of an even block and the one behind it.
  TIDAL_DEVICE void write_pair(int half, int block, float first, float second) const {
    if (in_pairs && may_write(half, block + 1)) {
      store_scores(line + 8 * half * p.block_lse_head_stride + block, first * kLn2,
                   second * kLn2);
    } else {
      write(half, block, first);
      write(half, block + 1, second);
    }
  }
};

// What one thread block does.
template <class S>
TIDAL_DEVICE void dense_decode_block(const AttendParams& p) {
  const Share share = find_share(p);
  if (!has_work(share)) return;
  const DenseEntries entries;
  OnlineSoftmax<S> softmax;
  attend_tiles<S>(p, entries, share, softmax, WriteBlockLse(p, share));
  join_warps<S>(p, share, softmax);
}

template <class S>
TIDAL_KERNEL(S::threads, S::blocks_per_processor)
dense_decode_kernel(const AttendParams p) {
  dense_decode_block<S>(p);
}

}  // namespace tidal
