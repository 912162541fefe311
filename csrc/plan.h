// How the work is cut, in plain integers: used by the host and by the kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TIDAL_BOTH __host__ __device__ __forceinline__
#else
#define TIDAL_BOTH inline
#endif

namespace tidal {

inline constexpr int kTileTokens = 16;  // slots that a warp takes at a time
inline constexpr int kTileHeads = 16;   // query heads of one thread block

TIDAL_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TIDAL_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
TIDAL_BOTH constexpr int smaller(int a, int b) { return a < b ? a : b; }
TIDAL_BOTH constexpr int larger(int a, int b) { return a > b ? a : b; }

// What a row may be split into, from what the host knows.
struct SplitLimits {
  int splits;
  int min_tokens;
};

// `units` thread blocks would do one row without splitting it. Four times as many as
// the GPU holds at once (two per processor) keep it busy; a batch that is large enough
// is still split eightfold, for a long row among short ones. Splits are cheap against
// min_tokens. Not yet measured on a GPU.
inline SplitLimits limit_splits(int64_t num_seqs, int64_t units, int processors,
                                int capacity, int at_least, int min_tokens) {
  const int64_t wanted = ceil_div(int64_t{8} * processors, num_seqs * units);
  const int splits = wanted < capacity ? static_cast<int>(wanted) : capacity;
  return {larger(1, larger(splits, smaller(at_least, capacity))), min_tokens};
}

// How one row is split: a function of its own length and of host constants only.
struct RowSplits {
  int used;        // 0 for an empty row
  int slots_each;  // of every split but perhaps the last; a multiple of grain
};

TIDAL_BOTH RowSplits split_row(int slots, int grain, int splits, int min_tokens) {
  if (slots == 0) return {0, 0};
  const int grains = ceil_div(slots, grain);
  const int each = ceil_div(grains, smaller(splits, ceil_div(slots, min_tokens)));
  return {ceil_div(grains, each), each * grain};
}

// What a set keeps of a sequence of `seq_len` tokens.
struct Kept {
  int total;   // blocks of the sequence
  int blocks;  // kept
  int sinks;   // the first blocks up to here are forced
  int recent;  // those from here on too
};

TIDAL_BOTH Kept kept_of(int seq_len, int token_budget, int keep_all_len, int size,
                        int sink_tokens, int recent_tokens) {
  const int total = ceil_div(seq_len, size);
  if (seq_len <= keep_all_len) return {total, total, total, total};
  const int recent = larger(seq_len - larger(recent_tokens, 1), 0) / size;
  return {total, token_budget / size, ceil_div(sink_tokens, size), recent};
}

}  // namespace tidal
