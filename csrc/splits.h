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
inline constexpr int kTileHeads = 16;  // most query heads of one thread block

TIDAL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TIDAL_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
TIDAL_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
TIDAL_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// The most splits of any row of a batch, between 1 and `capacity`. A row without splits
// takes `blocks_per_row` thread blocks. Four times the thread blocks that the GPU holds
// at once (two per processor) keep it busy. A large batch gets at least `at_least`
// splits, for a long row among short ones. Not yet measured on a GPU.
inline int limit_splits(int64_t num_rows, int64_t blocks_per_row, int processors,
                        int capacity, int at_least) {
  const int64_t wanted = ceil_div(int64_t{8} * processors, num_rows * blocks_per_row);
  const int splits = wanted < capacity ? static_cast<int>(wanted) : capacity;
  return larger(1, larger(splits, smaller(at_least, capacity)));
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
