// Into how many splits a row is cut, in plain integers: for the host and the kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TIDAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TIDAL_HOST_DEVICE inline
#endif

namespace tidal {

inline constexpr int kTileTokens = 16;  // entries that a warp takes at a time
// Consecutive tiles that a warp takes of a row that attends to all its tokens. What the
// tiles' selection blocks get is then neighbours in block_lse.
inline constexpr int kRunTiles = 4;
inline constexpr int kTileHeads = 16;  // most query heads of one thread block

TIDAL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TIDAL_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
TIDAL_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
TIDAL_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Thread blocks of one processor at a time, where its shared memory holds so many; tile.cuh
// says where.
#ifndef TIDAL_BLOCKS_PER_PROCESSOR
#define TIDAL_BLOCKS_PER_PROCESSOR 2
#endif
inline constexpr int kBlocksPerProcessor = TIDAL_BLOCKS_PER_PROCESSOR;
inline constexpr int kLeastWaves = 3;  // of a sparse batch that is more than one wave
inline constexpr int kMostWaves = 8;
inline constexpr int kDenseSplits = 32;  // more splits cost more to join than they gain

// The most splits of any row of a batch, between 1 and `capacity`. A row without splits
// takes `blocks_per_row` thread blocks; a wave is as many as the GPU holds at once.
//
// Sparse rows are mostly of one length. So they get the fewest waves, rounded down, of
// which a fifth at most stays empty: one more thread block than fits would double the time
// of a small batch. A batch that fills the GPU without splits gets three waves or more, as
// waves even out. Dense rows differ in length, so they get many, and at least `at_least`
// splits, for a long row among short ones.
//
// Chosen by benchmarks/model (docs/performance_model.md); only these limits were measured
// on a GPU, no others (docs/gpu_results.md). The number depends on constants of the host
// alone, never on the length of a row.
inline int limit_splits(int64_t num_rows, int64_t blocks_per_row, int processors,
                        int capacity, int at_least, bool sparse) {
  const int64_t wave = int64_t{kBlocksPerProcessor} * processors;
  const int64_t blocks = num_rows * blocks_per_row;
  int64_t splits = 0;
  if (sparse) {
    double fullest = 0.0;
    int waves = blocks <= wave ? 1 : kLeastWaves;
    for (; waves <= kMostWaves && fullest < 0.8; ++waves) {
      const int64_t found = waves * wave / blocks;
      const double full = static_cast<double>(found * blocks) / (waves * wave);
      if (full > fullest) {
        fullest = full;
        splits = found;
      }
    }
  } else {
    splits = kMostWaves * wave / blocks;
    const int64_t one_wave = wave / blocks;
    const int64_t most = one_wave > kDenseSplits ? one_wave : kDenseSplits;
    splits = splits < most ? splits : most;
  }
  const int wanted = splits < capacity ? static_cast<int>(splits) : capacity;
  return larger(1, larger(wanted, smaller(at_least, capacity)));
}

// How one row is split. This follows from the row's own length and from constants of the
// host, so a row's result never depends on the other rows.
struct RowSplits {
  int used;          // 0 for an empty row
  int entries_each;  // in every split but perhaps the last: a multiple of `grain`
};

TIDAL_HOST_DEVICE RowSplits split_row(int entries, int grain, int splits, int min_split_tokens) {
  if (entries == 0) return {0, 0};
  const int grains = ceil_div(entries, grain);
  const int most = smaller(splits, ceil_div(entries, min_split_tokens));
  const int each = ceil_div(grains, most);
  return {ceil_div(grains, each), each * grain};
}

}  // namespace tidal
