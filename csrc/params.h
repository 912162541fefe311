// What the kernels are given. Shapes: S sequences, H query heads, Hkv KV heads, D head
// size, G sets, N selection blocks, M blocks per sequence, P most splits of one row.
// Strides count elements.
#pragma once

#include <cstdint>

namespace tidal {

enum class Element : int { kBf16, kFp16, kFp8E4m3 };

// dense_decode, score_blocks and sparse_decode.
struct AttendParams {
  const void* query;         // [S, H, D] bf16 or fp16, last dim contiguous
  const void* kv_cache;      // [B, Hkv, block_size, 2D], K then V; query's type or fp8
  const int* block_table;    // [S, M] physical block ids
  const int* seq_lens;       // [S]; 0: a padded row; negative: one that is left out
  const int* topk_blocks;    // [S, G, max_blocks] logical; sparse_decode only
  const int* topk_lens;      // [S, G]; sparse_decode only
  void* output;              // [S, H, D] as query; null in score_blocks
  float* lse;                // [S, H] contiguous, natural logarithm
  float* block_lse;          // [S, H, N] or null; not sparse_decode
  float* partial_out;        // [S, H, P, D] contiguous, each normalised by itself; null
                             // in score_blocks
  float* partial_lse;        // [S, H, P] contiguous, natural logarithm

  int64_t query_row, query_head;
  int64_t cache_block, cache_head, cache_token;
  int64_t table_row;
  int64_t topk_row, topk_set;  // of topk_blocks
  int64_t topk_lens_row;
  int64_t output_row, output_head;
  int64_t block_lse_row, block_lse_head;

  Element element;  // of query and output
  Element stored;   // of kv_cache

  int num_seqs;
  int num_heads;
  int head_size;
  int group;            // query heads of one KV head
  int heads_per_set;    // sparse_decode: H / G
  int heads_per_unit;   // heads that one thread block may take together
  int tiles_per_unit;   // thread blocks of a unit: one per 16 heads
  int block_size;       // tokens
  int select_block_size;
  int num_blocks;       // N
  int split_capacity;   // P
  int splits;           // most that a row uses, at most P
  int min_split_tokens; // a row is split no finer than this

  float scale_log2;  // scale * k_scale * log2(e)
  float v_scale;
};

// Thread blocks that do one row without splitting it.
inline int thread_blocks(const AttendParams& p) {
  return p.num_heads / p.heads_per_unit * p.tiles_per_unit;
}

struct SelectParams {
  const float* block_lse;  // [S, H, N], last dim contiguous
  const float* lse;        // [S, H] contiguous
  const int* seq_lens;     // [S]; negative: a row that is left out
  int* topk_blocks;        // [S, G, max_blocks], last dim contiguous
  int* topk_lens;          // [S, G]
  float* mass;             // [S, G, N] workspace, last dim contiguous

  int64_t block_lse_row, block_lse_head;
  int64_t topk_row, topk_set;
  int64_t topk_lens_row;
  int64_t mass_row, mass_set;

  int num_seqs;
  int num_heads;
  int num_sets;
  int num_blocks;  // N
  int max_blocks;
  int token_budget;
  int select_block_size;
  int sink_tokens;
  int recent_tokens;
  int keep_all_len;  // max(sparse_threshold, token_budget)
};

}  // namespace tidal
