// The four ops: tidal_vllm/kernels/cuda.py says what they take, reference.py what they mean.
// Each checks its arguments (std::invalid_argument names argument, value and what is
// allowed), then launches; nothing is allocated or waited for, so all can be captured.
#pragma once

#include "launch.h"
#include "tensor_view.h"

namespace tidal {

struct AttendArguments {
  TensorView query, kv_cache, block_table, seq_lens, lse, partial_lse;
  const TensorView* output = nullptr;       // not score_blocks
  const TensorView* partial_out = nullptr;  // not score_blocks
  const TensorView* block_lse = nullptr;    // not sparse_decode; dense_decode: optional
  const TensorView* topk_blocks = nullptr;  // sparse_decode only
  const TensorView* topk_lens = nullptr;    // sparse_decode only
  double scale = 0, k_scale = 1, v_scale = 1;
  int64_t select_block_size = 0;
};

struct SelectArguments {
  TensorView block_lse, lse, seq_lens, topk_blocks, topk_lens, mass;
  int64_t token_budget = 0, select_block_size = 0, sink_tokens = 0, recent_tokens = 0,
          sparse_threshold = 0;
};

void dense_decode(const AttendArguments& arguments);
void score_blocks(const AttendArguments& arguments);
void sparse_decode(const AttendArguments& arguments);
void select_blocks(const SelectArguments& arguments);

}  // namespace tidal
