// Which share of the work a thread block does: one head tile of one row, and one split of
// the row's entries. params.h says what these words mean.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace tidal {

// The entries of a row that attends to all its tokens.
struct DenseEntries {
  // Reads which block was chosen for an entry: there is no choice here.
  TIDAL_DEVICE int chosen(int) const { return 0; }
  // The position of an entry in the sequence, given what `chosen` read.
  TIDAL_DEVICE int position(int entry, int) const { return entry; }
};

// The entries of a row that attends to its chosen blocks, in the order of the list.
struct SparseEntries {
  const int* blocks;
  const Divisor& by_block_size;  // of a selection block
  int seq_len;

  TIDAL_DEVICE int chosen(int entry) const {
    return blocks[by_block_size.quotient(entry)];
  }
  // The position of an entry in the sequence, or -1 where there is no such token.
  TIDAL_DEVICE int position(int entry, int chosen) const {
    const int in_list = by_block_size.quotient(entry);
    const int position = entry + (chosen - in_list) * by_block_size.value;
    return position < seq_len ? position : -1;
  }
};

// A thread block's share of the work.
struct Share {
  int row;
  int seq_len;
  int first_head;
  int num_heads;  // at most kTileHeads
  int split;
  RowSplits splits;
  int begin, end;  // entries
  int grain;       // entries that one warp takes in one go: a multiple of kTileTokens
  Divisor by_grain_tiles;

  // The first entry of the i-th tile of a warp; it grows with i.
  TIDAL_DEVICE int tile_begin(int warp, int warps, int i) const {
    const int before = by_grain_tiles.quotient(i);  // grains of this warp
    const int grains = before * (warps - 1) + warp;  // of other warps, before this tile
    return begin + grains * grain + i * kTileTokens;
  }
};

// The number of entries of a row for a query head: its tokens, or those of the blocks
// chosen for that head, even where the last block reaches past the sequence.
TIDAL_DEVICE int count_entries(const AttendParams& p, int row, int head, int seq_len) {
  if (seq_len <= 0) return 0;
  if (p.topk_lens == nullptr) return seq_len;
  return p.topk_lens[row * p.topk_lens_row_stride + head / p.heads_per_set] *
         p.select_block_size;
}

// The tiles that one warp takes in one go: one where sparse; the whole of a selection
// block that is larger than a tile, to sum it up; else kRunTiles.
TIDAL_DEVICE Divisor grain_tiles_of(const AttendParams& p) {
  Divisor tiles = p.by_grain_tiles;
  if (p.topk_lens == nullptr && tiles.value == 1) {
    static_assert(kRunTiles == 4);
    tiles.value = kRunTiles;
    tiles.shift = 2;
  }
  return tiles;
}

// Grid: (head groups times head tiles, splits, rows). The first that a kernel does.
TIDAL_DEVICE Share find_share(const AttendParams& p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int group = block_x() / p.head_tiles, head_tile = block_x() % p.head_tiles;
  Share share;
  share.row = block_z();
  share.seq_len = p.seq_lens[share.row];
  share.first_head = group * p.heads_per_group + head_tile * kTileHeads;
  share.num_heads = smaller(kTileHeads, p.heads_per_group - head_tile * kTileHeads);
  share.split = block_y();
  share.by_grain_tiles = grain_tiles_of(p);
  share.grain = share.by_grain_tiles.value * kTileTokens;
  const int entries = count_entries(p, share.row, share.first_head, share.seq_len);
  share.splits = split_row(entries, share.grain, p.splits, p.min_split_tokens);
  share.begin = share.split * share.splits.entries_each;
  share.end = smaller(entries, share.begin + share.splits.entries_each);
  return share;
}

// Whether a thread block has anything to write. The first split of an empty row writes
// zeros; a row that is left out writes nothing.
TIDAL_DEVICE bool has_work(const Share& share) {
  return share.seq_len >= 0 && share.split < larger(share.splits.used, 1);
}

}  // namespace tidal
