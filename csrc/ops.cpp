#include "ops.h"

#include <cmath>

#include "checks.h"
#include "plan.h"

namespace tidal {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kMostRows = 65535;  // the grid's limit

// Rows are split no finer than this. Not yet measured on a GPU.
constexpr int kDenseSplitTokens = 512;
constexpr int kSparseSplitTokens = 128;
constexpr int kDenseSplitsAtLeast = 8;  // their lengths differ more

Element element_of(const std::string& dtype) {
  if (dtype == "bfloat16") return Element::kBf16;
  return dtype == "float16" ? Element::kFp16 : Element::kFp8E4m3;
}

void check_scale(const Checks& checks, const char* name, double value, bool free) {
  checks.that(std::isfinite(value), name, value, "finite numbers");
  checks.that(free || value == 1.0, name, value, "1.0 unless kv_cache is fp8");
}

void check_paged(Checks& checks, const AttendArguments& a) {
  checks.tensor(a.query, "query", 3, {"bfloat16", "float16"});
  const int64_t rows = a.query.size(0), heads = a.query.size(1), dims = a.query.size(2);
  checks.that(rows <= kMostRows, "query.size(0)", rows, "up to 65535");
  checks.that(dims == 64 || dims == 96 || dims == 128 || dims == 256, "head_size", dims,
              "64, 96, 128 or 256");
  const TensorView& cache = a.kv_cache;
  checks.tensor(cache, "kv_cache", 4,
                {a.query.dtype.c_str(), "float8_e4m3fn", "uint8"});
  checks.size(cache, "kv_cache", 3, 2 * dims, "K and V side by side");
  checks.that(cache.size(1) > 0 && heads % cache.size(1) == 0, "kv_cache.size(1)",
              cache.size(1), "a divisor of query.size(1) = " + std::to_string(heads));
  checks.in_range("kv_cache.size(2)", cache.size(2), 1);
  const int bytes = cache.dtype == a.query.dtype ? 2 : 1;
  for (int dim = 0; dim < 3; ++dim) {
    checks.that(cache.stride(dim) * bytes % 16 == 0 || cache.size(dim) == 1,
                "kv_cache.stride(" + std::to_string(dim) + ")", cache.stride(dim),
                "multiples of 16 bytes, " + std::to_string(16 / bytes) + " elements");
  }
  const auto address = reinterpret_cast<uintptr_t>(cache.data);
  checks.that(address % 16 == 0, "kv_cache.data_ptr()", address, "multiples of 16");
  checks.tensor(a.block_table, "block_table", 2, {"int32"});
  checks.size_at_least(a.block_table, "block_table", 0, rows, "as query has rows");
  checks.tensor(a.seq_lens, "seq_lens", 1, {"int32"});
  checks.size_at_least(a.seq_lens, "seq_lens", 0, rows, "as query has rows");
  check_scale(checks, "scale", a.scale, true);
  check_scale(checks, "k_scale", a.k_scale, bytes == 1);
  check_scale(checks, "v_scale", a.v_scale, bytes == 1);
  checks.in_range("select_block_size", a.select_block_size, 1);
  checks.that(cache.size(2) % a.select_block_size == 0, "select_block_size",
              a.select_block_size,
              "divisors of the KV block size, " + std::to_string(cache.size(2)));
}

void check_results(Checks& checks, const AttendArguments& a) {
  const int64_t rows = a.query.size(0), heads = a.query.size(1), dims = a.query.size(2);
  if (a.output) {
    checks.tensor(*a.output, "output", 3, {a.query.dtype.c_str()});
    checks.size_at_least(*a.output, "output", 0, rows, "as query has rows");
    checks.size(*a.output, "output", 1, heads, "as in query");
    checks.size(*a.output, "output", 2, dims, "as in query");
    checks.tensor(*a.partial_out, "partial_out", 4, {"float32"});
    checks.size_at_least(*a.partial_out, "partial_out", 0, rows, "as query has rows");
    checks.size(*a.partial_out, "partial_out", 1, heads, "the number of heads");
    checks.in_range("partial_out.size(2)", a.partial_out->size(2), 1);
    checks.size(*a.partial_out, "partial_out", 3, dims, "the head size");
    checks.contiguous(*a.partial_out, "partial_out");
  }
  checks.tensor(a.lse, "lse", 2, {"float32"});
  checks.size_at_least(a.lse, "lse", 0, rows, "as query has rows");
  checks.size(a.lse, "lse", 1, heads, "the number of heads");
  checks.contiguous(a.lse, "lse");
  checks.tensor(a.partial_lse, "partial_lse", 3, {"float32"});
  checks.size_at_least(a.partial_lse, "partial_lse", 0, rows, "as query has rows");
  checks.size(a.partial_lse, "partial_lse", 1, heads, "the number of heads");
  checks.in_range("partial_lse.size(2)", a.partial_lse.size(2), 1);
  if (a.partial_out) {
    checks.size(a.partial_lse, "partial_lse", 2, a.partial_out->size(2),
                "as in partial_out");
  }
  checks.contiguous(a.partial_lse, "partial_lse");
}

void check_block_lse(Checks& checks, const TensorView& t, int64_t rows, int64_t heads) {
  checks.tensor(t, "block_lse", 3, {"float32"});
  checks.size_at_least(t, "block_lse", 0, rows, "as there are rows");
  checks.size(t, "block_lse", 1, heads, "the number of heads");
  checks.in_range("block_lse.size(2)", t.size(2), 0);
}

// Returns the number of sets.
int64_t check_topk(Checks& checks, const TensorView& blocks, const TensorView& lens,
                   int64_t rows, int64_t heads) {
  checks.tensor(blocks, "topk_blocks", 3, {"int32"});
  const int64_t sets = blocks.size(1);
  checks.size_at_least(blocks, "topk_blocks", 0, rows, "as there are rows");
  checks.that(sets > 0 && heads % sets == 0, "topk_blocks.size(1)", sets,
              "a divisor of the number of heads, " + std::to_string(heads));
  checks.tensor(lens, "topk_lens", 2, {"int32"});
  checks.size_at_least(lens, "topk_lens", 0, rows, "as there are rows");
  checks.size(lens, "topk_lens", 1, sets, "as in topk_blocks");
  return sets;
}

AttendParams params_of(const AttendArguments& a) {
  AttendParams p{};
  p.query = a.query.data;
  p.kv_cache = a.kv_cache.data;
  p.block_table = static_cast<const int*>(a.block_table.data);
  p.seq_lens = static_cast<const int*>(a.seq_lens.data);
  p.lse = static_cast<float*>(a.lse.data);
  p.partial_lse = static_cast<float*>(a.partial_lse.data);
  p.query_row = a.query.stride(0);
  p.query_head = a.query.stride(1);
  p.cache_block = a.kv_cache.stride(0);
  p.cache_head = a.kv_cache.stride(1);
  p.cache_token = a.kv_cache.stride(2);
  p.table_row = a.block_table.stride(0);
  if (a.output) {
    p.output = a.output->data;
    p.output_row = a.output->stride(0);
    p.output_head = a.output->stride(1);
    p.partial_out = static_cast<float*>(a.partial_out->data);
  }
  p.element = element_of(a.query.dtype);
  p.stored = element_of(a.kv_cache.dtype);
  p.num_seqs = static_cast<int>(a.query.size(0));
  p.num_heads = static_cast<int>(a.query.size(1));
  p.head_size = static_cast<int>(a.query.size(2));
  p.group = p.num_heads / static_cast<int>(a.kv_cache.size(1));
  p.heads_per_unit = p.group;
  p.block_size = static_cast<int>(a.kv_cache.size(2));
  p.select_block_size = static_cast<int>(a.select_block_size);
  p.split_capacity = static_cast<int>(a.partial_lse.size(2));
  p.scale_log2 = static_cast<float>(a.scale * a.k_scale * kLog2E);
  p.v_scale = static_cast<float>(a.v_scale);
  return p;
}

void plan(AttendParams& p, int processors, int splits_at_least, int split_tokens) {
  p.tiles_per_unit = ceil_div(p.heads_per_unit, kTileHeads);
  const SplitLimits limits =
      limit_splits(p.num_seqs, thread_blocks(p), processors, p.split_capacity,
                   splits_at_least, split_tokens);
  p.splits = smaller(limits.splits, kMostRows);
  p.min_split_tokens = limits.min_tokens;
}

// All tokens of each row.
void attend_densely(const char* op, const AttendArguments& a,
                    void (*launch)(const AttendParams&, const Stream&)) {
  Checks checks(op, kDeviceType);
  check_paged(checks, a);
  check_results(checks, a);
  if (a.block_lse) {
    check_block_lse(checks, *a.block_lse, a.query.size(0), a.query.size(1));
    const int64_t size = a.select_block_size;
    checks.that(size == 1 || size == 2 || size == 4 || size == 8 || size % 16 == 0,
                "select_block_size", size, "1, 2, 4, 8 and multiples of 16");
  }
  if (a.query.size(0) == 0) return;
  AttendParams p = params_of(a);
  if (a.block_lse) {
    p.block_lse = static_cast<float*>(a.block_lse->data);
    p.block_lse_row = a.block_lse->stride(0);
    p.block_lse_head = a.block_lse->stride(1);
    p.num_blocks = static_cast<int>(a.block_lse->size(2));
  }
  plan(p, count_processors(checks.device_index()), kDenseSplitsAtLeast,
       kDenseSplitTokens);
  launch(p, current_stream(checks.device_index()));
}

}  // namespace

void dense_decode(const AttendArguments& a) {
  attend_densely("dense_decode", a, launch_dense_decode);
}

void score_blocks(const AttendArguments& a) {
  attend_densely("score_blocks", a, launch_score_blocks);
}

void sparse_decode(const AttendArguments& a) {
  Checks checks("sparse_decode", kDeviceType);
  check_paged(checks, a);
  check_results(checks, a);
  const int64_t rows = a.query.size(0), heads = a.query.size(1);
  const int64_t sets = check_topk(checks, *a.topk_blocks, *a.topk_lens, rows, heads);
  const int64_t kv_heads = a.kv_cache.size(1);
  checks.that(sets % kv_heads == 0 || kv_heads % sets == 0, "topk_blocks.size(1)", sets,
              "divisors or multiples of the number of KV heads, " +
                  std::to_string(kv_heads));
  if (rows == 0) return;
  AttendParams p = params_of(a);
  p.topk_blocks = static_cast<const int*>(a.topk_blocks->data);
  p.topk_lens = static_cast<const int*>(a.topk_lens->data);
  p.topk_row = a.topk_blocks->stride(0);
  p.topk_set = a.topk_blocks->stride(1);
  p.topk_lens_row = a.topk_lens->stride(0);
  p.heads_per_set = p.num_heads / static_cast<int>(sets);
  p.heads_per_unit = smaller(p.group, p.heads_per_set);
  plan(p, count_processors(checks.device_index()), 1, kSparseSplitTokens);
  launch_sparse_decode(p, current_stream(checks.device_index()));
}

void select_blocks(const SelectArguments& a) {
  Checks checks("select_blocks", kDeviceType);
  checks.tensor(a.seq_lens, "seq_lens", 1, {"int32"});
  const int64_t rows = a.seq_lens.size(0), heads = a.block_lse.size(1);
  checks.that(rows <= kMostRows, "seq_lens.size(0)", rows, "up to 65535");
  check_block_lse(checks, a.block_lse, rows, heads);
  checks.tensor(a.lse, "lse", 2, {"float32"});
  checks.size_at_least(a.lse, "lse", 0, rows, "as seq_lens has rows");
  checks.size(a.lse, "lse", 1, heads, "as in block_lse");
  checks.contiguous(a.lse, "lse");
  const int64_t sets = check_topk(checks, a.topk_blocks, a.topk_lens, rows, heads);
  checks.tensor(a.mass, "mass", 3, {"float32"});
  checks.size_at_least(a.mass, "mass", 0, rows, "as seq_lens has rows");
  checks.size(a.mass, "mass", 1, sets, "as in topk_blocks");
  checks.size_at_least(a.mass, "mass", 2, a.block_lse.size(2), "as in block_lse");
  checks.in_range("token_budget", a.token_budget, 1);
  checks.in_range("select_block_size", a.select_block_size, 1);
  checks.in_range("sink_tokens", a.sink_tokens, 0);
  checks.in_range("recent_tokens", a.recent_tokens, 0);
  checks.in_range("sparse_threshold", a.sparse_threshold, 0);
  const int64_t size = a.select_block_size, budget = a.token_budget / size;
  checks.that(a.token_budget % size == 0, "token_budget", a.token_budget,
              "multiples of select_block_size = " + std::to_string(size));
  const int64_t newest = a.recent_tokens > 1 ? a.recent_tokens : 1;
  const int64_t forced = ceil_div(a.sink_tokens, size) + ceil_div(newest - 1, size) + 1;
  checks.that(forced <= budget, "token_budget", a.token_budget,
              "room for the forced tokens, " + std::to_string(forced) + " blocks of " +
                  std::to_string(size));
  const int64_t keep_all =
      a.sparse_threshold > a.token_budget ? a.sparse_threshold : a.token_budget;
  const int64_t most = ceil_div(keep_all, size);
  checks.size_at_least(a.topk_blocks, "topk_blocks", 2,
                       most < a.block_lse.size(2) ? most : a.block_lse.size(2),
                       "the most blocks that a row keeps");
  if (rows == 0) return;
  SelectParams p{};
  p.block_lse = static_cast<const float*>(a.block_lse.data);
  p.lse = static_cast<const float*>(a.lse.data);
  p.seq_lens = static_cast<const int*>(a.seq_lens.data);
  p.topk_blocks = static_cast<int*>(a.topk_blocks.data);
  p.topk_lens = static_cast<int*>(a.topk_lens.data);
  p.mass = static_cast<float*>(a.mass.data);
  p.block_lse_row = a.block_lse.stride(0);
  p.block_lse_head = a.block_lse.stride(1);
  p.topk_row = a.topk_blocks.stride(0);
  p.topk_set = a.topk_blocks.stride(1);
  p.topk_lens_row = a.topk_lens.stride(0);
  p.mass_row = a.mass.stride(0);
  p.mass_set = a.mass.stride(1);
  p.num_seqs = static_cast<int>(rows);
  p.num_heads = static_cast<int>(heads);
  p.num_sets = static_cast<int>(sets);
  p.num_blocks = static_cast<int>(a.block_lse.size(2));
  p.max_blocks = static_cast<int>(a.topk_blocks.size(2));
  p.token_budget = static_cast<int>(a.token_budget);
  p.select_block_size = static_cast<int>(size);
  p.sink_tokens = static_cast<int>(a.sink_tokens);
  p.recent_tokens = static_cast<int>(a.recent_tokens);
  p.keep_all_len = static_cast<int>(keep_all);
  launch_select_blocks(p, current_stream(checks.device_index()));
}

}  // namespace tidal
