#include "ops.h"

#include <cmath>

#include "cache_units.h"
#include "checks.h"
#include "launch.h"
#include "splits.h"

namespace tidal {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kMostRows = 65535;  // the limit of a grid in z

// What tells the three ops that attend apart. Other numbers were not measured on a GPU.
struct AttendOp {
  const char* name;
  bool writes_output;
  bool sparse;
  int splits_at_least;   // where a row is long enough for them
  int min_split_tokens;  // a row is split no finer than this
  void (*launch)(const AttendParams&, const Stream&);
  KernelUse (*use)(const AttendParams&, int device_index);
};

// The lengths of dense rows differ more, so they get some splits in any batch.
constexpr AttendOp kDenseDecode{
    "dense_decode", true, false, 8, 512, launch_dense_decode, use_of_dense_decode};
constexpr AttendOp kScoreBlocks{
    "score_blocks", false, false, 8, 512, launch_score_blocks, use_of_score_blocks};
constexpr AttendOp kSparseDecode{
    "sparse_decode", true, true, 1, 128, launch_sparse_decode, use_of_sparse_decode};

Element element_of(const std::string& dtype) {
  if (dtype == "bfloat16") return Element::kBf16;
  return dtype == "float16" ? Element::kFp16 : Element::kFp8E4m3;
}

void check_given(const Checks& checks, const AttendOp& op, const AttendArguments& a) {
  if (op.writes_output) {
    checks.given(a.output, "output");
    checks.given(a.partial_out, "partial_out");
  } else {
    checks.absent(a.output, "output");
    checks.absent(a.partial_out, "partial_out");
    checks.given(a.block_lse, "block_lse");
  }
  if (op.sparse) {
    checks.given(a.topk_blocks, "topk_blocks");
    checks.given(a.topk_lens, "topk_lens");
    checks.absent(a.block_lse, "block_lse");
  } else {
    checks.absent(a.topk_blocks, "topk_blocks");
    checks.absent(a.topk_lens, "topk_lens");
  }
  if (a.block_lse || a.topk_blocks) {
    checks.given(a.select_block_size, "select_block_size", "an integer");
  }
}

void check_head_size(const Checks& checks, int64_t size) {
  checks.that(size == 64 || size == 96 || size == 128 || size == 256, "head_size", size,
              "64, 96, 128 or 256");
}

void check_scale(const Checks& checks, const char* name, double value, bool free) {
  checks.that(std::isfinite(value), name, value, "finite numbers");
  checks.that(free || value == 1.0, name, value, "1.0 unless kv_cache is fp8");
}

void check_inputs(Checks& checks, const AttendArguments& a) {
  checks.tensor(a.query, "query", 3, {"bfloat16", "float16"});
  const int64_t rows = a.query.size(0), heads = a.query.size(1), dims = a.query.size(2);
  checks.that(rows <= kMostRows, "query.size(0)", rows, "up to 65535");
  check_head_size(checks, dims);
  const TensorView& cache = a.kv_cache;
  checks.tensor(cache, "kv_cache", 4, {a.query.dtype.c_str(), "float8_e4m3fn", "uint8"});
  checks.size(cache, "kv_cache", 3, 2 * dims, "K and V side by side");
  checks.in_range("query.size(1)", heads, 1);
  checks.that(cache.size(1) > 0 && heads % cache.size(1) == 0, "kv_cache.size(1)",
              cache.size(1), "a divisor of query.size(1) = " + std::to_string(heads));
  checks.in_range("kv_cache.size(2)", cache.size(2), 1);
  const int bytes = cache.dtype == a.query.dtype ? 2 : 1;
  for (int dim = 0; dim < 3; ++dim) {
    checks.that(cache.stride(dim) * bytes % 16 == 0 || cache.size(dim) == 1,
                "kv_cache.stride(" + std::to_string(dim) + ")", cache.stride(dim),
                "multiples of 16 bytes, " + std::to_string(16 / bytes) + " elements");
  }
  checks.aligned(cache, "kv_cache");
  CacheUnits(cache, bytes).check(checks, cache);
  checks.tensor(a.block_table, "block_table", 2, {"int32"});
  checks.size_at_least(a.block_table, "block_table", 0, rows, "as query has rows");
  checks.tensor(a.seq_lens, "seq_lens", 1, {"int32"});
  checks.size_at_least(a.seq_lens, "seq_lens", 0, rows, "as query has rows");
  check_scale(checks, "scale", a.scale, true);
  check_scale(checks, "k_scale", a.k_scale, bytes == 1);
  check_scale(checks, "v_scale", a.v_scale, bytes == 1);
  if (!a.select_block_size) return;
  checks.in_range("select_block_size", *a.select_block_size, 1);
  checks.that(cache.size(2) % *a.select_block_size == 0, "select_block_size",
              *a.select_block_size,
              "divisors of the KV block size, " + std::to_string(cache.size(2)));
}

void check_block_lse(Checks& checks, const TensorView& t, int64_t rows, int64_t heads) {
  checks.tensor(t, "block_lse", 3, {"float32"});
  checks.size_at_least(t, "block_lse", 0, rows, "as there are rows");
  checks.size(t, "block_lse", 1, heads, "the number of heads");
  checks.in_range("block_lse.size(2)", t.size(2), 0);
}

void check_arrivals(Checks& checks, const TensorView& t, int64_t rows, int64_t heads) {
  checks.tensor(t, "arrivals", 2, {"int32"});
  checks.size_at_least(t, "arrivals", 0, rows, "as there are rows");
  checks.size(t, "arrivals", 1, heads, "the number of heads");
  checks.contiguous(t, "arrivals");
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
    checks.aligned(*a.partial_out, "partial_out");
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
  check_arrivals(checks, a.arrivals, rows, heads);
  if (a.block_lse) {
    check_block_lse(checks, *a.block_lse, rows, heads);
    const int64_t size = *a.select_block_size;
    checks.that(size == 1 || size == 2 || size == 4 || size == 8 || size % 16 == 0,
                "select_block_size", size, "1, 2, 4, 8 and multiples of 16");
  }
}

void check_topk(Checks& checks, const TensorView& blocks, const TensorView& lens,
                int64_t rows, int64_t heads) {
  checks.tensor(blocks, "topk_blocks", 3, {"int32"});
  const int64_t sets = blocks.size(1);
  checks.size_at_least(blocks, "topk_blocks", 0, rows, "as there are rows");
  checks.that(sets > 0 && heads % sets == 0, "topk_blocks.size(1)", sets,
              "a divisor of the number of heads, " + std::to_string(heads));
  checks.tensor(lens, "topk_lens", 2, {"int32"});
  checks.size_at_least(lens, "topk_lens", 0, rows, "as there are rows");
  checks.size(lens, "topk_lens", 1, sets, "as in topk_blocks");
}

// The sets that sparse_decode reads.
void check_sets(Checks& checks, const AttendArguments& a) {
  check_topk(checks, *a.topk_blocks, *a.topk_lens, a.query.size(0), a.query.size(1));
  const int64_t sets = a.topk_blocks->size(1), kv_heads = a.kv_cache.size(1);
  checks.that(
      sets % kv_heads == 0 || kv_heads % sets == 0, "topk_blocks.size(1)", sets,
      "divisors or multiples of the number of KV heads, " + std::to_string(kv_heads));
}

AttendParams params_of(const AttendArguments& a) {
  AttendParams p{};
  p.query = a.query.data;
  p.kv_cache = a.kv_cache.data;
  p.block_table = static_cast<const int*>(a.block_table.data);
  p.seq_lens = static_cast<const int*>(a.seq_lens.data);
  p.lse = static_cast<float*>(a.lse.data);
  p.partial_lse = static_cast<float*>(a.partial_lse.data);
  p.arrivals = static_cast<unsigned*>(a.arrivals.data);
  p.query_row_stride = a.query.stride(0);
  p.query_head_stride = a.query.stride(1);
  p.cache_head_stride = a.kv_cache.stride(1);
  p.block_table_row_stride = a.block_table.stride(0);
  p.element = element_of(a.query.dtype);
  p.stored = element_of(a.kv_cache.dtype);
  const CacheUnits units(a.kv_cache, p.stored == Element::kFp8E4m3 ? 1 : 2);
  p.cache_unit_bytes = static_cast<uint32_t>(units.bytes);
  p.cache_block_units = static_cast<uint32_t>(units.block);
  p.cache_token_units = static_cast<uint32_t>(units.token);
  p.num_rows = static_cast<int>(a.query.size(0));
  p.num_heads = static_cast<int>(a.query.size(1));
  p.head_size = static_cast<int>(a.query.size(2));
  p.heads_per_kv_head = p.num_heads / static_cast<int>(a.kv_cache.size(1));
  p.heads_per_group = p.heads_per_kv_head;
  p.block_size = static_cast<int>(a.kv_cache.size(2));
  p.select_block_size = static_cast<int>(a.select_block_size.value_or(1));
  p.by_block_size = Divisor(p.block_size);
  p.by_select_block_size = Divisor(p.select_block_size);
  if (a.block_lse && p.select_block_size > kTileTokens) {
    p.by_grain_tiles = Divisor(p.select_block_size / kTileTokens);
  }
  p.split_capacity = static_cast<int>(a.partial_lse.size(2));
  p.scale_log2 = static_cast<float>(a.scale * a.k_scale * kLog2E);
  p.v_scale = static_cast<float>(a.v_scale);
  if (a.output) {
    p.output = a.output->data;
    p.output_row_stride = a.output->stride(0);
    p.output_head_stride = a.output->stride(1);
    p.partial_out = static_cast<float*>(a.partial_out->data);
  }
  if (a.block_lse) {
    p.block_lse = static_cast<float*>(a.block_lse->data);
    p.block_lse_row_stride = a.block_lse->stride(0);
    p.block_lse_head_stride = a.block_lse->stride(1);
    p.num_blocks = static_cast<int>(a.block_lse->size(2));
  }
  if (a.topk_blocks) {
    p.topk_blocks = static_cast<const int*>(a.topk_blocks->data);
    p.topk_lens = static_cast<const int*>(a.topk_lens->data);
    p.topk_row_stride = a.topk_blocks->stride(0);
    p.topk_set_stride = a.topk_blocks->stride(1);
    p.topk_lens_row_stride = a.topk_lens->stride(0);
    p.heads_per_set = p.num_heads / static_cast<int>(a.topk_blocks->size(1));
    p.heads_per_group = smaller(p.heads_per_kv_head, p.heads_per_set);
  }
  p.head_tiles = ceil_div(p.heads_per_group, kTileHeads);
  return p;
}

void attend(const AttendOp& op, const AttendArguments& a) {
  Checks checks(op.name, kDeviceType);
  check_given(checks, op, a);
  check_inputs(checks, a);
  check_results(checks, a);
  if (op.sparse) check_sets(checks, a);
  if (a.query.size(0) == 0) return;
  AttendParams p = params_of(a);
  p.splits = limit_splits(p.num_rows, thread_blocks(p),
                          count_processors(checks.device_index()),
                          smaller(p.split_capacity, kMostSplits), op.splits_at_least,
                          op.sparse);
  p.min_split_tokens = op.min_split_tokens;
  op.launch(p, current_stream(checks.device_index()));
}

// Whether the last dimension of a float tensor can be read four at a time.
bool in_quads(const TensorView& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride(0) % 4 == 0 &&
         t.stride(1) % 4 == 0;
}

void check_rule(const Checks& checks, const SelectArguments& a) {
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
}

}  // namespace

void dense_decode(const AttendArguments& arguments) { attend(kDenseDecode, arguments); }
void score_blocks(const AttendArguments& arguments) { attend(kScoreBlocks, arguments); }
void sparse_decode(const AttendArguments& arguments) { attend(kSparseDecode, arguments); }

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
  check_topk(checks, a.topk_blocks, a.topk_lens, rows, heads);
  checks.tensor(a.mass, "mass", 3, {"float32"});
  checks.size_at_least(a.mass, "mass", 0, rows, "as seq_lens has rows");
  checks.size(a.mass, "mass", 1, a.topk_blocks.size(1), "as in topk_blocks");
  checks.size_at_least(a.mass, "mass", 2, a.block_lse.size(2), "as in block_lse");
  check_arrivals(checks, a.arrivals, rows, heads);
  checks.tensor(a.digit_counts, "digit_counts", 3, {"int32"});
  checks.size_at_least(a.digit_counts, "digit_counts", 0, rows, "as seq_lens has rows");
  checks.size(a.digit_counts, "digit_counts", 1, a.topk_blocks.size(1),
              "as in topk_blocks");
  checks.size(a.digit_counts, "digit_counts", 2, kFirstDigits, "the digits of a mass");
  checks.contiguous(a.digit_counts, "digit_counts");
  check_rule(checks, a);
  const int64_t keep_all =
      a.sparse_threshold > a.token_budget ? a.sparse_threshold : a.token_budget;
  const int64_t most = ceil_div(keep_all, a.select_block_size);
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
  p.arrivals = static_cast<unsigned*>(a.arrivals.data);
  p.digit_counts = static_cast<int*>(a.digit_counts.data);
  p.block_lse_row_stride = a.block_lse.stride(0);
  p.block_lse_head_stride = a.block_lse.stride(1);
  p.topk_row_stride = a.topk_blocks.stride(0);
  p.topk_set_stride = a.topk_blocks.stride(1);
  p.topk_lens_row_stride = a.topk_lens.stride(0);
  p.mass_row_stride = a.mass.stride(0);
  p.mass_set_stride = a.mass.stride(1);
  p.block_lse_in_quads = in_quads(a.block_lse);
  p.mass_in_quads = in_quads(a.mass);
  p.num_rows = static_cast<int>(rows);
  p.num_heads = static_cast<int>(heads);
  p.num_sets = static_cast<int>(a.topk_blocks.size(1));
  p.num_blocks = static_cast<int>(a.block_lse.size(2));
  p.max_blocks = static_cast<int>(a.topk_blocks.size(2));
  p.token_budget = static_cast<int>(a.token_budget);
  p.select_block_size = static_cast<int>(a.select_block_size);
  p.sink_tokens = static_cast<int>(a.sink_tokens);
  p.recent_tokens = static_cast<int>(a.recent_tokens);
  p.keep_all_len = static_cast<int>(keep_all);
  launch_select_blocks(p, current_stream(checks.device_index()));
}

std::vector<int64_t> occupancy(const std::string& op, const std::string& dtype,
                               const std::string& kv_cache_dtype, int64_t head_size,
                               int64_t device_index) {
  const Checks checks("occupancy", kDeviceType);
  checks.that(device_index >= 0, "device_index", device_index, "0 or more");
  const int device = static_cast<int>(device_index);
  KernelUse use{};
  if (op == "select_blocks") {
    use = use_of_select_blocks(device);
  } else {
    const AttendOp* const found = op == "dense_decode"    ? &kDenseDecode
                                  : op == "score_blocks"  ? &kScoreBlocks
                                  : op == "sparse_decode" ? &kSparseDecode
                                                          : nullptr;
    checks.that(found != nullptr, "op", op,
                "dense_decode, score_blocks, sparse_decode or select_blocks");
    checks.that(dtype == "bfloat16" || dtype == "float16", "dtype", dtype,
                "bfloat16 or float16");
    checks.that(kv_cache_dtype == dtype || kv_cache_dtype == "float8_e4m3fn",
                "kv_cache_dtype", kv_cache_dtype, dtype + " or float8_e4m3fn");
    check_head_size(checks, head_size);
    AttendParams p{};
    p.element = element_of(dtype);
    p.stored = element_of(kv_cache_dtype);
    p.head_size = static_cast<int>(head_size);
    use = found->use(p, device);
  }
  return {use.blocks_per_processor, use.threads,        use.registers,
          use.shared_bytes,         use.local_bytes,    use.binary_version,
          use.ptx_version,          use.programmatic};
}

}  // namespace tidal
