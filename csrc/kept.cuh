// How much a set keeps of a row, before any mass is known.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace tidal {

// All fields count selection blocks.
struct Kept {
  int total;   // of the row's sequence
  int blocks;  // kept
  int sinks;   // blocks before this one are forced
  int recent;  // this block and all after it are forced

  // How many of the blocks that are not forced are kept; 0 where masses do not matter.
  TIDAL_DEVICE int room() const {
    if (blocks == total || recent <= sinks) return 0;
    return larger(blocks - sinks - (total - recent), 0);
  }
};

TIDAL_DEVICE Kept kept_of(const SelectParams& p, int seq_len) {
  const int size = p.select_block_size;
  const int total = ceil_div(seq_len, size);
  if (seq_len <= p.keep_all_len) return {total, total, total, total};
  const int recent = larger(seq_len - larger(p.recent_tokens, 1), 0) / size;
  return {total, p.token_budget / size, ceil_div(p.sink_tokens, size), recent};
}

// Whether a selection block holds tokens of the sequence.
TIDAL_DEVICE bool begins_before(const SelectParams& p, int block, int seq_len) {
  return static_cast<int64_t>(block) * p.select_block_size < seq_len;
}

}  // namespace tidal
