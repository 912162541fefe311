// What the kernels are given. The words that all files here use:
//   row         one query token of one decoding sequence
//   set         the selection blocks that were chosen for a row and some of its query
//               heads
//   head group  the query heads that share both their KV head and their set
//   head tile   up to 16 query heads of a head group, which one thread block takes
//   entry       one token that a row attends to, by number: its position in the sequence
//               (dense), or its place in the row's chosen blocks (sparse)
//   tile        16 entries, which one warp takes at a time
//   split       consecutive entries of a row, which one thread block takes
//   lane        the index of a thread in its warp
// Shapes: R rows, H query heads, Hkv KV heads, D head size, G sets per row, N selection
// blocks, M KV blocks per sequence, P most splits of one row. Strides count elements.
#pragma once

#include <cstdint>

#include "divisor.h"

namespace tidal {

// The most splits of one row; MAX_SPLITS of tidal_vllm/kernels/workspace.py.
inline constexpr int kMostSplits = 128;
// The first digits of a mass; FIRST_DIGITS there.
inline constexpr int kFirstDigits = 2048;

enum class Element : int { kBf16, kFp16, kFp8E4m3 };

// For dense_decode, score_blocks and sparse_decode.
struct AttendParams {
  const void* query;       // [R, H, D] bf16 or fp16, last dim contiguous
  const void* kv_cache;    // [B, Hkv, block_size, 2D], K then V; query's type or fp8
  const int* block_table;  // [R, M] physical KV blocks
  const int* seq_lens;     // [R]; 0: a row of padding; negative: a row that is left out
  const int* topk_blocks;  // [R, G, max_blocks] logical blocks; null unless sparse
  const int* topk_lens;    // [R, G]; null unless sparse
  void* output;            // [R, H, D] as query; null in score_blocks
  float* lse;              // [R, H] contiguous, natural logarithm
  float* block_lse;        // [R, H, N] natural logarithm; null: not wanted
  float* partial_out;  // [R, H, P, D] contiguous, the output of each split alone; null
                       // in score_blocks
  float* partial_lse;  // [R, H, P] contiguous, natural logarithm
  unsigned* arrivals;  // [R, H] contiguous, zeros before and after: arrivals.cuh. A head
                       // tile counts its splits in the place of its first head

  int64_t query_row_stride, query_head_stride;
  int64_t cache_head_stride;
  // The place of a token of a head's cache: units * cache_unit_bytes, and the units fit
  // 32 bits. A physical block has block_units, a token in it token_units.
  uint32_t cache_unit_bytes, cache_block_units, cache_token_units;
  int64_t block_table_row_stride;
  int64_t topk_row_stride, topk_set_stride;  // of topk_blocks
  int64_t topk_lens_row_stride;
  int64_t output_row_stride, output_head_stride;
  int64_t block_lse_row_stride, block_lse_head_stride;

  Element element;  // of query and output
  Element stored;   // of kv_cache

  int num_rows;
  int num_heads;
  int head_size;
  int heads_per_kv_head;
  int heads_per_set;  // H / G where sparse
  int heads_per_group;
  int head_tiles;         // of a head group
  int block_size;         // tokens of a KV block
  int select_block_size;  // tokens of a selection block
  Divisor by_block_size;
  Divisor by_select_block_size;
  Divisor by_grain_tiles;  // by the tiles that one warp takes in one go
  int num_blocks;         // N
  int split_capacity;     // P
  int splits;             // the most that a row is split into: at most P, kMostSplits
  int min_split_tokens;   // a row is split no finer than this

  float scale_log2;  // scale * k_scale * log2(e)
  float v_scale;
};

// The thread blocks that take one row without splitting it.
inline int thread_blocks(const AttendParams& p) {
  return p.num_heads / p.heads_per_group * p.head_tiles;
}

struct SelectParams {
  const float* block_lse;  // [R, H, N], last dim contiguous
  const float* lse;        // [R, H] contiguous
  const int* seq_lens;     // [R]; 0: a row of padding; negative: a row that is left out
  int* topk_blocks;        // [R, G, max_blocks], last dim contiguous
  int* topk_lens;          // [R, G]
  float* mass;             // [R, G, N] workspace, last dim contiguous
  unsigned* arrivals;      // [R, H] contiguous, zeros before and after; a set counts in
                           // the place of head number `set`
  int* digit_counts;       // [R, G, kFirstDigits] contiguous, zeros before and after: how
                           // many of the masses that are chosen from have a first digit

  int64_t block_lse_row_stride, block_lse_head_stride;
  int64_t topk_row_stride, topk_set_stride;  // of topk_blocks
  int64_t topk_lens_row_stride;
  int64_t mass_row_stride, mass_set_stride;
  // Whether all heads (sets) of the tensor begin at multiples of 16 bytes.
  bool block_lse_in_quads, mass_in_quads;

  int num_rows;
  int num_heads;
  int num_sets;    // G
  int num_blocks;  // N
  int max_blocks;
  int token_budget;
  int select_block_size;
  int sink_tokens;
  int recent_tokens;
  int keep_all_len;  // max(sparse_threshold, token_budget)
};

}  // namespace tidal
