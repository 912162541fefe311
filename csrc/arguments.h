// The arguments of the ops: one structure for the three ops that attend, one for
// select_blocks. tidal_vllm/kernels/arguments.py says what each argument means, cuda.py
// which shapes are allowed.
//
// The list `for_each_argument` gives names and order. The ops' schemas, the binding to
// PyTorch and the tests' emulation all follow from it, and the type of a field says the
// rest: whether the tensor is written, and whether it may be None. So a new argument is a
// field and a line of the list, before ops.cpp checks it and hands it to the kernels.
#pragma once

#include <optional>

#include "tensor_view.h"

namespace tidal {

// For dense_decode, score_blocks and sparse_decode.
struct AttendArguments {
  TensorView query, kv_cache, block_table, seq_lens;
  WrittenTensor lse, partial_lse, arrivals;
  double scale = 0, k_scale = 0, v_scale = 0;
  std::optional<int64_t> select_block_size;          // with block_lse or topk_blocks
  std::optional<WrittenTensor> output, partial_out;  // not for score_blocks
  std::optional<WrittenTensor> block_lse;            // not for sparse_decode
  std::optional<TensorView> topk_blocks, topk_lens;  // for sparse_decode alone
};

template <class Visit>
void for_each_argument(AttendArguments& a, Visit&& visit) {
  visit("query", a.query);
  visit("kv_cache", a.kv_cache);
  visit("block_table", a.block_table);
  visit("seq_lens", a.seq_lens);
  visit("lse", a.lse);
  visit("partial_lse", a.partial_lse);
  visit("arrivals", a.arrivals);
  visit("scale", a.scale);
  visit("k_scale", a.k_scale);
  visit("v_scale", a.v_scale);
  visit("select_block_size", a.select_block_size);
  visit("output", a.output);
  visit("partial_out", a.partial_out);
  visit("block_lse", a.block_lse);
  visit("topk_blocks", a.topk_blocks);
  visit("topk_lens", a.topk_lens);
}

struct SelectArguments {
  TensorView block_lse, lse, seq_lens;
  WrittenTensor topk_blocks, topk_lens, mass, arrivals, digit_counts;
  int64_t token_budget = 0, select_block_size = 0, sink_tokens = 0, recent_tokens = 0,
          sparse_threshold = 0;
};

template <class Visit>
void for_each_argument(SelectArguments& a, Visit&& visit) {
  visit("block_lse", a.block_lse);
  visit("lse", a.lse);
  visit("seq_lens", a.seq_lens);
  visit("topk_blocks", a.topk_blocks);
  visit("topk_lens", a.topk_lens);
  visit("mass", a.mass);
  visit("arrivals", a.arrivals);
  visit("digit_counts", a.digit_counts);
  visit("token_budget", a.token_budget);
  visit("select_block_size", a.select_block_size);
  visit("sink_tokens", a.sink_tokens);
  visit("recent_tokens", a.recent_tokens);
  visit("sparse_threshold", a.sparse_threshold);
}

}  // namespace tidal
