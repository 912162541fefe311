// The first part of select_blocks: the mass of selection blocks, summed over the heads of
// a set. Has run under the CPU emulation only, not yet on a GPU.
//
// Nearly all bytes of select_blocks are read here, so each thread has several loads of 16
// bytes under way. Where a set has many heads, they are dealt out over the threads too.
// The masses are counted here as well, by their first digit, so that the thread block that
// chooses finds the counts of the whole row ready.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace tidal {

inline constexpr int kSelectThreads = 512;
inline constexpr int kHeadDepth = 8;  // loads of four blocks that a thread has under way
inline constexpr int kMostHeadParts = 4;

// Masses as keys, the bits of floats: those that are not negative are ordered alike. The
// first digit of a key is what is left of kFirstShift.
inline constexpr int kFirstShift = 20;
inline constexpr int kBins = kFirstDigits;

struct SumShared {
  float parts[(kMostHeadParts - 1) * (kSelectThreads / kMostHeadParts) * 4];
  int counts[kBins];
};

// How the threads of a thread block share the selection blocks and the heads of a set.
struct MassTile {
  int head_parts;  // threads that share four selection blocks, each with heads of its own

  TIDAL_HOST_DEVICE int quads() const { return kSelectThreads / head_parts; }
  TIDAL_HOST_DEVICE int blocks() const { return 4 * quads(); }
};

// A thread gets two heads or more, so that it has two loads or more under way.
TIDAL_HOST_DEVICE MassTile tile_of(const SelectParams& p) {
  const int heads = p.num_heads / p.num_sets;
  return {heads >= 2 * kMostHeadParts ? kMostHeadParts : heads >= 4 ? 2 : 1};
}

// The thread blocks that the longest sequence needs for one set; at least one.
inline int count_tiles(const SelectParams& p) {
  return larger(1, ceil_div(p.num_blocks, tile_of(p).blocks()));
}

// Adds to `sum` the masses of four selection blocks, from number `block` on, of every
// `step`-th head from `head` to `heads`. Without kQuads, those beyond num_blocks are left
// as they are.
template <bool kQuads>
TIDAL_DEVICE void add_heads(const SelectParams& p, const float* block_lse,
                            const float* lse, int head, int heads, int step, int block,
                            float (&sum)[4]) {
  constexpr int kDepth = kQuads ? kHeadDepth : 1;
  block_lse += block;
#pragma unroll 1
  for (; head < heads; head += kDepth * step) {
    float found[kDepth][4] = {}, of_head[kDepth] = {};
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int at = head + i * step;
      if (at >= heads) continue;
      const float* from = block_lse + at * p.block_lse_head_stride;
      of_head[i] = lse[at];
      if constexpr (kQuads) {
        load_quad(found[i], from);
      } else {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          if (block + d < p.num_blocks) found[i][d] = from[d];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (head + i * step >= heads) continue;
#pragma unroll
      for (int d = 0; d < 4; ++d) sum[d] += exp2_of((found[i][d] - of_head[i]) * kLog2E);
    }
  }
}

// Publishes to `mass`, the line of this row and set, the masses of this thread block's
// tile, and adds to `digit_counts`, int [kBins], how many of those from `begin` to `end`
// have which first digit. `blocks` is how many masses there are in the row.
TIDAL_DEVICE void sum_masses(const SelectParams& p, int row, int set, int blocks,
                             int begin, int end, float* mass, int* digit_counts) {
  SumShared* shared = reinterpret_cast<SumShared*>(shared_memory());
  for (int bin = thread_index(); bin < kBins; bin += kSelectThreads) {
    shared->counts[bin] = 0;
  }
  const MassTile tile = tile_of(p);
  const int part = thread_index() / tile.quads(), quad = thread_index() % tile.quads();
  const int block = block_x() * tile.blocks() + 4 * quad;
  const int heads = p.num_heads / p.num_sets, first = set * heads;
  const float* from =
      p.block_lse + row * p.block_lse_row_stride + first * p.block_lse_head_stride;
  const float* lse = p.lse + static_cast<int64_t>(row) * p.num_heads + first;
  float sum[4] = {};
  if (block < blocks) {
    if (p.block_lse_in_quads && block + 4 <= p.num_blocks) {
      add_heads<true>(p, from, lse, part, heads, tile.head_parts, block, sum);
    } else {
      add_heads<false>(p, from, lse, part, heads, tile.head_parts, block, sum);
    }
  }
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    if (part > 0) shared->parts[(part - 1) * tile.blocks() + 4 * quad + d] = sum[d];
  }
  sync_block();
  if (part == 0 && block < blocks) {
    for (int other = 0; other < tile.head_parts - 1; ++other) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        sum[d] += shared->parts[other * tile.blocks() + 4 * quad + d];
      }
    }
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      sum[d] = sum[d] > 0.f ? sum[d] : 0.f;  // NaN weighs nothing
      if (block + d >= begin && block + d < end) {
        atomic_add_shared(&shared->counts[float_bits(sum[d]) >> kFirstShift], 1);
      }
    }
    if (p.mass_in_quads && block + 4 <= p.num_blocks) {
      publish_quad(mass + block, sum);
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        if (block + d < p.num_blocks) publish(mass + block + d, sum[d]);
      }
    }
  }
  sync_block();
  for (int bin = thread_index(); bin < kBins; bin += kSelectThreads) {
    const int count = shared->counts[bin];
    if (count > 0) add_published(digit_counts + bin, count);
  }
}

}  // namespace tidal
