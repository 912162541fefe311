// The first part of select_blocks: the mass of selection blocks, summed over the heads of
// a set.
//
// Nearly all bytes of select_blocks are read here, so each thread has several loads of 16
// bytes under way. Where a set has many heads, they are dealt out over the threads too. A
// thread block takes several tiles of selection blocks where there are more tiles than
// the GPU runs at once: it asks for the next one before it counts and publishes the last.
// The masses are counted here as well, by their first digit, so that the thread block that
// chooses finds the counts of the whole row ready.
#pragma once

#include "kept.cuh"

namespace tidal {

inline constexpr int kSelectThreads = 512;
// Heads whose loads of four blocks a thread starts together; twice as many are under way.
inline constexpr int kStepHeads = 4;
inline constexpr int kTileBits = 11;  // log2 of a tile's blocks if no threads share heads
inline constexpr int kMostPartBits = 2;
static_assert(1 << kTileBits == 4 * kSelectThreads);
inline constexpr int kManyBlocks = 256;  // about the thread blocks that a GPU runs at once

// Masses as keys, the bits of floats: those that are not negative are ordered alike. The
// first digit of a key is what is left of kFirstShift.
inline constexpr int kFirstShift = 20;
inline constexpr int kBins = kFirstDigits;

// Four neighbours in memory, loaded and stored at once.
struct alignas(16) Quad {
  float of[4];
};

// What all parts of select_blocks have in shared memory, at the same place.
struct SelectShared {
  Kept rule;
};

struct SumShared : SelectShared {
  Quad parts[2][kSelectThreads];  // of this tile, and of the one before or after it
  int counts[kBins];
};

// How the threads of a thread block share the selection blocks and the heads of a set.
struct MassTile {
  int part_bits;  // 1 << part_bits threads share four selection blocks, each with heads of
                  // its own

  TIDAL_HOST_DEVICE int head_parts() const { return 1 << part_bits; }
  TIDAL_HOST_DEVICE int quads() const { return kSelectThreads >> part_bits; }
  TIDAL_HOST_DEVICE int blocks() const { return 4 * quads(); }
  // How many tiles hold so many selection blocks.
  TIDAL_HOST_DEVICE int tiles(int num_blocks) const {
    return (num_blocks + blocks() - 1) >> (kTileBits - part_bits);
  }
};

// A thread gets two heads or more, so that it has two loads or more under way.
TIDAL_HOST_DEVICE MassTile tile_of(int heads_per_set) {
  return {heads_per_set >= 8 ? kMostPartBits : heads_per_set >= 4 ? 1 : 0};
}

// The thread blocks that share the tiles of one row and set; at least one. Each takes
// every so-manyth tile.
TIDAL_HOST_DEVICE int sharers_of(const SelectParams& p, const MassTile& tile) {
  const int tiles = larger(1, tile.tiles(p.num_blocks));
  const int64_t all = static_cast<int64_t>(tiles) * p.num_sets * p.num_rows;
  const int each_bits = all > 2 * kManyBlocks ? 2 : all > kManyBlocks ? 1 : 0;
  return (tiles + (1 << each_bits) - 1) >> each_bits;
}

// The same, for the host.
inline int sharers_of(const SelectParams& p) {
  return sharers_of(p, tile_of(p.num_heads / p.num_sets));
}

// Loads under way: of some heads, for four selection blocks.
struct HeadStep {
  float found[kStepHeads][4];
};

// The heads that a thread adds up, of one row and set.
struct ThreadHeads {
  const float* block_lse;  // of the set's first head
  const float* lse;
  int64_t stride;
  int heads;       // of the set
  int parts;       // the thread takes every so-manyth of them
  int num_blocks;  // of a line of block_lse
  bool in_quads;

  // Starts to load what `add` needs for heads from number `head` on. Selection blocks
  // beyond num_blocks weigh as a block_lse of 0.
  TIDAL_DEVICE void load(HeadStep& step, int head, int block) const {
    const float* from = block_lse + head * stride + block;
    if (in_quads && block + 4 <= num_blocks) {
#pragma unroll
      for (int i = 0; i < kStepHeads; ++i) {
        if (head + i * parts < heads) load_quad(step.found[i], from);
        from = next_head(from);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStepHeads; ++i) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const bool exists = head + i * parts < heads && block + d < num_blocks;
          step.found[i][d] = exists ? from[d] : 0.f;
        }
        from = next_head(from);
      }
    }
  }
  // One address at a time, so that few registers hold addresses.
  TIDAL_DEVICE const float* next_head(const float* from) const {
    const char* next = reinterpret_cast<const char*>(from + parts * stride);
    return reinterpret_cast<const float*>(opaque(next));
  }

  // Each lse is read again for each tile, from L1.
  TIDAL_DEVICE void add(const HeadStep& step, int head, float (&sum)[4]) const {
    float of_head[kStepHeads];
#pragma unroll
    for (int i = 0; i < kStepHeads; ++i) {
      of_head[i] = head + i * parts < heads ? lse[head + i * parts] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kStepHeads; ++i) {
      if (head + i * parts >= heads) continue;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        sum[d] += exp2_of((step.found[i][d] - of_head[i]) * kLog2E);
      }
    }
  }
};

// Adds up the parts of a tile, publishes its masses, and counts the first digits of those
// that are chosen from. `first` is the number of the tile's first selection block.
TIDAL_DEVICE void publish_tile(const MassTile& tile, const Quad* parts, SumShared* shared,
                               int first, int blocks, float* mass) {
  const float* of_part = parts[0].of;
#pragma unroll 1
  for (int i = thread_index(); i < tile.blocks() && first + i < blocks;
       i += kSelectThreads) {
    float sum = of_part[i];
#pragma unroll
    for (int part = 1; part < 1 << kMostPartBits; ++part) {
      if (part < tile.head_parts()) sum += of_part[part * tile.blocks() + i];
    }
    sum = sum > 0.f ? sum : 0.f;  // NaN weighs nothing
    if (first + i >= shared->rule.sinks && first + i < shared->rule.recent) {
      atomic_add_shared(&shared->counts[float_bits(sum) >> kFirstShift], 1);
    }
    publish(mass + first + i, sum);
  }
}

// Publishes to `mass`, the line of this row and set, the masses of this thread block's
// tiles, and adds to `digit_counts`, int [kBins], how many of those that are chosen from
// have which first digit. `heads` is how many a set has. Returns how many thread blocks do
// so for this row and set, or 0 where masses do not matter.
TIDAL_DEVICE int sum_masses(const SelectParams& p, const MassTile& tile, int row, int set,
                            int heads, int seq_len, float* mass, int* digit_counts) {
  SumShared* shared = reinterpret_cast<SumShared*>(shared_memory());
  const int part = thread_index() >> (kTileBits - 2 - tile.part_bits);
  const int quad = thread_index() & (tile.quads() - 1);
  const ThreadHeads of_thread = {
      p.block_lse + row * p.block_lse_row_stride + set * heads * p.block_lse_head_stride,
      p.lse + static_cast<int64_t>(row) * p.num_heads + set * heads,
      p.block_lse_head_stride,
      heads,
      tile.head_parts(),
      p.num_blocks,
      p.block_lse_in_quads};
  const int step = kStepHeads * tile.head_parts();
  HeadStep even, odd;
  int first = block_x() * tile.blocks(), block = first + 4 * quad;
  // The first loads do not wait for the divisions of kept_of.
  if (seq_len > p.keep_all_len && begins_before(p, block, seq_len)) {
    of_thread.load(even, part, block);
  }
#pragma unroll
  for (int i = 0; i < kBins / kSelectThreads; ++i) {
    shared->counts[i * kSelectThreads + thread_index()] = 0;
  }
  const Kept kept = kept_of(p, seq_len);
  if (kept.room() == 0) return 0;
  if (thread_index() == 0) shared->rule = kept;
  const int blocks = smaller(kept.total, p.num_blocks);
  const int sharers = smaller(tile.tiles(blocks), sharers_of(p, tile));
  int turn = 0;
#pragma unroll 1
  for (; first < blocks; first += sharers * tile.blocks()) {
    float sum[4] = {};
    const int next = block + sharers * tile.blocks();
#pragma unroll 1
    for (int head = part; block < blocks && head < heads; head += 2 * step) {
      if (head + step < heads) of_thread.load(odd, head + step, block);
      of_thread.add(even, head, sum);
      if (head + 2 * step < heads) {
        of_thread.load(even, head + 2 * step, block);
      } else if (next < blocks) {
        of_thread.load(even, part, next);
      }
      of_thread.add(odd, head + step, sum);
    }
    block = next;
    Quad* parts = shared->parts[turn];
    turn ^= 1;
    parts[thread_index()] = {sum[0], sum[1], sum[2], sum[3]};
    sync_block();
    publish_tile(tile, parts, shared, first, blocks, mass);
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < kBins / kSelectThreads; ++i) {
    const int bin = i * kSelectThreads + thread_index();
    const int count = shared->counts[bin];
    if (count > 0) add_published(digit_counts + bin, count);
  }
  return sharers;
}

}  // namespace tidal
