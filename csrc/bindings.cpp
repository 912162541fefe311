// torch.ops.tidal: PyTorch's stable ABI, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "ops.h"

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

tidal::TensorView view(const Tensor& t) {
  tidal::TensorView result;
  result.data = t.data_ptr();
  result.dtype = dtype_of(t);
  result.device = t.is_cuda() ? "cuda" : t.is_cpu() ? "cpu" : "another device";
  result.device_index = t.is_cuda() ? t.get_device_index() : 0;
  result.rank = static_cast<int>(t.dim());
  for (int i = 0; i < result.rank && i < 4; ++i) {
    result.sizes[i] = t.size(i);
    result.strides[i] = t.stride(i);
  }
  return result;
}

// What all ops that attend begin with.
tidal::AttendArguments attend_arguments(const Tensor& query, const Tensor& kv_cache,
                                        const Tensor& block_table,
                                        const Tensor& seq_lens, const Tensor& lse,
                                        const Tensor& partial_lse, double scale,
                                        double k_scale, int64_t select_block_size) {
  tidal::AttendArguments a;
  a.query = view(query);
  a.kv_cache = view(kv_cache);
  a.block_table = view(block_table);
  a.seq_lens = view(seq_lens);
  a.lse = view(lse);
  a.partial_lse = view(partial_lse);
  a.scale = scale;
  a.k_scale = k_scale;
  a.select_block_size = select_block_size;
  return a;
}

void dense_decode(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                  const Tensor& seq_lens, const Tensor& output, const Tensor& lse,
                  std::optional<Tensor> block_lse, const Tensor& partial_out,
                  const Tensor& partial_lse, double scale, double k_scale, double v_scale,
                  int64_t select_block_size) {
  auto a = attend_arguments(query, kv_cache, block_table, seq_lens, lse, partial_lse,
                            scale, k_scale, select_block_size);
  const tidal::TensorView out = view(output), part = view(partial_out);
  a.output = &out;
  a.partial_out = &part;
  tidal::TensorView scores;
  if (block_lse) a.block_lse = &(scores = view(*block_lse));
  a.v_scale = v_scale;
  tidal::dense_decode(a);
}

void score_blocks(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                  const Tensor& seq_lens, const Tensor& lse, const Tensor& block_lse,
                  const Tensor& partial_lse, double scale, double k_scale,
                  int64_t select_block_size) {
  auto a = attend_arguments(query, kv_cache, block_table, seq_lens, lse, partial_lse,
                            scale, k_scale, select_block_size);
  const tidal::TensorView scores = view(block_lse);
  a.block_lse = &scores;
  tidal::score_blocks(a);
}

void sparse_decode(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
                   const Tensor& topk_blocks, const Tensor& topk_lens,
                   const Tensor& seq_lens, const Tensor& output, const Tensor& lse,
                   const Tensor& partial_out, const Tensor& partial_lse, double scale,
                   double k_scale, double v_scale, int64_t select_block_size) {
  auto a = attend_arguments(query, kv_cache, block_table, seq_lens, lse, partial_lse,
                            scale, k_scale, select_block_size);
  const tidal::TensorView out = view(output), part = view(partial_out);
  a.output = &out;
  a.partial_out = &part;
  const tidal::TensorView blocks = view(topk_blocks), lens = view(topk_lens);
  a.topk_blocks = &blocks;
  a.topk_lens = &lens;
  a.v_scale = v_scale;
  tidal::sparse_decode(a);
}

void select_blocks(const Tensor& block_lse, const Tensor& lse, const Tensor& seq_lens,
                   const Tensor& topk_blocks, const Tensor& topk_lens,
                   const Tensor& mass, int64_t token_budget, int64_t select_block_size,
                   int64_t sink_tokens, int64_t recent_tokens,
                   int64_t sparse_threshold) {
  tidal::SelectArguments a;
  a.block_lse = view(block_lse);
  a.lse = view(lse);
  a.seq_lens = view(seq_lens);
  a.topk_blocks = view(topk_blocks);
  a.topk_lens = view(topk_lens);
  a.mass = view(mass);
  a.token_budget = token_budget;
  a.select_block_size = select_block_size;
  a.sink_tokens = sink_tokens;
  a.recent_tokens = recent_tokens;
  a.sparse_threshold = sparse_threshold;
  tidal::select_blocks(a);
}

}  // namespace

STABLE_TORCH_LIBRARY(tidal, m) {
  m.def(
      "dense_decode(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor(a!) output, Tensor(b!) lse, Tensor(c!)? block_lse, "
      "Tensor(d!) partial_out, Tensor(e!) partial_lse, float scale, float k_scale, "
      "float v_scale, int select_block_size) -> ()");
  m.def(
      "score_blocks(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor(a!) lse, Tensor(b!) block_lse, Tensor(c!) partial_lse, float scale, "
      "float k_scale, int select_block_size) -> ()");
  m.def(
      "sparse_decode(Tensor query, Tensor kv_cache, Tensor block_table, "
      "Tensor topk_blocks, Tensor topk_lens, Tensor seq_lens, Tensor(a!) output, "
      "Tensor(b!) lse, Tensor(c!) partial_out, Tensor(d!) partial_lse, float scale, "
      "float k_scale, float v_scale, int select_block_size) -> ()");
  m.def(
      "select_blocks(Tensor block_lse, Tensor lse, Tensor seq_lens, "
      "Tensor(a!) topk_blocks, Tensor(b!) topk_lens, Tensor(c!) mass, "
      "int token_budget, int select_block_size, int sink_tokens, int recent_tokens, "
      "int sparse_threshold) -> ()");
}

// For all devices: a tensor on a wrong one is refused by name.
STABLE_TORCH_LIBRARY_IMPL(tidal, CompositeExplicitAutograd, m) {
  m.impl("dense_decode", TORCH_BOX(&dense_decode));
  m.impl("score_blocks", TORCH_BOX(&score_blocks));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("select_blocks", TORCH_BOX(&select_blocks));
}
