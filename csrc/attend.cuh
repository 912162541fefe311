// What dense_decode, score_blocks and sparse_decode share: one thread block attends up to
// 16 query heads of one row to one split of its tokens. Has run under the CPU emulation
// only, not yet on a GPU.
//
// Each warp takes tiles of 16 tokens of its own, through its own asynchronous pipeline:
// no barrier of the block until the warps' results are joined at the end. A tile's row
// is K and V of one token, copied together, or K alone. q.k and p.v are mma.m16n8k16
// with the heads as rows, so each K/V row is read once for all heads of a unit.
//
// NOTE: fp8 rows are taken as 16-bit pairs of bytes and widened in registers, even bytes
// into one operand and odd ones into another. So the dims of q.k meet in another order,
// and two tiles of the output interleave: `query_dim` and `output_dim` say how.
#pragma once

#include <stdexcept>

#include "params.h"
#include "primitives.cuh"

namespace tidal {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();
inline constexpr int kSharedLimit = 101376;  // bytes: sm_89 has the least
inline constexpr int kMostStages = 6;
inline constexpr int kRowPad = 16;  // bytes: eight rows at a time hit distinct banks

// Without values (score_blocks) there is K in the tiles, and no output.
template <class T_, class Stored_, int kHeadSize, bool kReadValues>
struct Shape {
  using T = T_;
  using Stored = Stored_;
  static constexpr int head_size = kHeadSize;
  static constexpr bool fp8 = sizeof(Stored) == 1;
  static constexpr bool read_values = kReadValues;
  static constexpr int warps = kHeadSize > 128 ? 2 : 4;
  static constexpr int threads = 32 * warps;
  static constexpr int value_byte = kHeadSize * sizeof(Stored);
  static constexpr int row_bytes = kReadValues ? 2 * value_byte : value_byte;
  static constexpr int chunks = row_bytes / 16;
  // For L2: V is not to come along with K.
  static constexpr int around = kReadValues || row_bytes % 128 == 0 ? 128 : 64;
  static constexpr int row_stride = row_bytes + kRowPad;
  static constexpr int stage_bytes = kTileTokens * row_stride;
  static constexpr int steps = kHeadSize / 16;
  static constexpr bool query_in_shared = kReadValues && kHeadSize > 128;
  static constexpr int query_bytes = query_in_shared ? steps * 32 * 16 : 0;
  static constexpr int stages =
      smaller(kMostStages, (kSharedLimit - query_bytes) / (warps * stage_bytes));
  static constexpr int out_tiles = kReadValues ? 2 * steps : 0;  // of 8 dims each
  static constexpr int out_stride = kReadValues ? kHeadSize + 4 : 0;  // floats
  static constexpr int join_bytes = warps * kTileHeads * (out_stride + 2) * 4;
  static constexpr int shared_bytes =
      larger(warps * stages * stage_bytes + query_bytes, join_bytes);
  static_assert(kHeadSize % 32 == 0 && stages >= 2 && shared_bytes <= kSharedLimit);
  static_assert(kTileTokens * chunks % 32 == 0 && row_stride / 16 % 2 == 1);
};

// Which dim of the head the lane's operand register holds: `pair` 0 or 1 of step
// `step`, half `i`.
template <class S>
TIDAL_DEVICE int query_dim(int step, int pair, int i) {
  const int quad = thread_index() % 4;
  return step * 16 + (S::fp8 ? 4 * quad + pair + 2 * i : 2 * quad + 8 * pair + i);
}

// Which dim register r % 2 of output tile `tile` holds.
template <class S>
TIDAL_DEVICE int output_dim(int tile, int r) {
  const int quad = thread_index() % 4;
  return S::fp8 ? tile / 2 * 16 + 4 * quad + 2 * r + tile % 2 : tile * 8 + 2 * quad + r;
}

// Four bytes of e4m3 to even = bytes 0 and 2, odd = bytes 1 and 3. Exact: the exponent
// and mantissa are shifted into place and rescaled.
TIDAL_DEVICE uint32_t widen(bf16, uint32_t bytes) {
  return times_2_to_120(bf16{}, (bytes & 0x007f007f) << 4 | (bytes & 0x00800080) << 8);
}
TIDAL_DEVICE uint32_t widen(fp16, uint32_t bytes) {
  return times_256(fp16{}, (bytes & 0x007f007f) << 7 | (bytes & 0x00800080) << 8);
}
template <class T>
TIDAL_DEVICE void widen(uint32_t bytes, uint32_t& even, uint32_t& odd) {
  even = widen(T{}, bytes);
  odd = widen(T{}, bytes >> 8);
  const uint32_t nan = ((bytes & 0x7f7f7f7f) + 0x01010101) & 0x80808080;
  if (nan) {
    even |= (nan >> 7 & 0x00010001) * 0x7fff;
    odd |= (nan >> 15 & 0x00010001) * 0x7fff;
  }
}

// The row's tokens, by slot: all of them, or those of the chosen blocks.
struct DenseSlots {
  int count;

  TIDAL_DEVICE int position(int slot) const { return slot < count ? slot : -1; }
};

struct SparseSlots {
  int count;
  const int* blocks;
  int block_size;
  int seq_len;

  // -1: past the end of the set or of the sequence.
  TIDAL_DEVICE int position(int slot) const {
    if (slot >= count) return -1;
    const int position = blocks[slot / block_size] * block_size + slot % block_size;
    return position < seq_len ? position : -1;
  }
};

// A thread block's share of the work.
struct Share {
  int row;
  int seq_len;
  int head;      // first
  int heads;     // at most kTileHeads
  int split;
  RowSplits splits;
  int begin, end;  // slots
  int grain;       // slots that one warp takes together, a multiple of kTileTokens

  // The first slot of a warp's i-th tile; rises with i.
  TIDAL_DEVICE int slot(int warp, int warps, int i) const {
    if (grain == kTileTokens) return begin + (i * warps + warp) * kTileTokens;
    const int tiles = grain / kTileTokens;
    return begin + (i / tiles * warps + warp) * grain + i % tiles * kTileTokens;
  }
};

// A set's slots in one row: tokens, or those of the chosen blocks.
TIDAL_DEVICE int count_slots(const AttendParams& p, int row, int head, int seq_len) {
  if (seq_len <= 0) return 0;
  if (p.topk_lens == nullptr) return seq_len;
  return p.topk_lens[row * p.topk_lens_row + head / p.heads_per_set] *
         p.select_block_size;
}

// A selection block's scores are summed up by one warp.
TIDAL_DEVICE int grain_of(const AttendParams& p) {
  return p.block_lse ? larger(kTileTokens, p.select_block_size) : kTileTokens;
}

// Grid: units times tiles_per_unit, splits, rows.
TIDAL_DEVICE Share find_share(const AttendParams& p) {
  const int unit = block_x() / p.tiles_per_unit, tile = block_x() % p.tiles_per_unit;
  Share share;
  share.row = block_z();
  share.seq_len = p.seq_lens[share.row];
  share.head = unit * p.heads_per_unit + tile * kTileHeads;
  share.heads = smaller(kTileHeads, p.heads_per_unit - tile * kTileHeads);
  share.split = block_y();
  share.grain = grain_of(p);
  const int slots = count_slots(p, share.row, share.head, share.seq_len);
  share.splits = split_row(slots, share.grain, p.splits, p.min_split_tokens);
  share.begin = share.split * share.splits.slots_each;
  share.end = smaller(slots, share.begin + share.splits.slots_each);
  return share;
}

// Whether there is anything to do, be it the zeros of an empty row; not in one that is
// left out.
TIDAL_DEVICE bool has_work(const Share& share) {
  return share.seq_len >= 0 && share.split < larger(share.splits.used, 1);
}

// Of a warp: the output so far is out / sum, relative to 2**top.
template <class S>
struct State {
  float top[2];  // of heads lane / 4 and lane / 4 + 8
  float sum[2];  // this lane's part
  float out[S::read_values ? S::out_tiles : 1][4];
};

// Copies tiles to shared memory. A tile's addresses depend on two loads, one after the
// other; both are started one tile earlier than they are needed.
template <class S, class Slots>
struct Loader {
  const AttendParams& p;
  const Slots& slots;
  const Share& share;
  const char* cache;
  const int* table;
  char* stages;  // this warp's
  int next_position;
  int token, block;  // of the tile that is copied next: place in its block, or -1

  TIDAL_DEVICE Loader(const AttendParams& p, const Slots& slots, const Share& share)
      : p(p), slots(slots), share(share) {
    cache = static_cast<const char*>(p.kv_cache) +
            share.head / p.group * p.cache_head * sizeof(typename S::Stored);
    table = p.block_table + share.row * p.table_row;
    stages = shared_memory() + thread_index() / 32 * S::stages * S::stage_bytes;
    find(position_of(0));
    next_position = position_of(1);
  }

  TIDAL_DEVICE int position_of(int tile) const {
    const int slot = share.slot(thread_index() / 32, S::warps, tile) +
                     thread_index() % kTileTokens;
    return slot < share.end ? slots.position(slot) : -1;
  }

  TIDAL_DEVICE void find(int position) {
    const int logical = position < 0 ? 0 : position / p.block_size;
    token = position < 0 ? -1 : position - logical * p.block_size;
    block = position < 0 ? 0 : table[logical];
  }

  TIDAL_DEVICE char* stage(int tile) const {
    return stages + tile % S::stages * S::stage_bytes;
  }

  // Starts the copy of the warp's i-th tile; the padding of its first row tells which
  // tokens are there. The others become zeros.
  TIDAL_DEVICE void copy(int tile) {
    const int lane = thread_index() % 32;
    int64_t offset = -1;
    if (token >= 0) offset = block * p.cache_block + token * p.cache_token;
    char* to = stage(tile);
    const unsigned present = ballot(token >= 0) & 0xffff;
    if (lane == 0) *reinterpret_cast<unsigned*>(to + S::row_bytes) = present;
#pragma unroll 4
    for (int i = 0; i < kTileTokens * S::chunks / 32; ++i) {
      const int chunk = i * 32 + lane;
      const int row = chunk / S::chunks, byte = chunk % S::chunks * 16;
      const int64_t from = shuffle(offset, row);
      const int64_t first = (from < 0 ? 0 : from) * int64_t{sizeof(typename S::Stored)};
      copy_async_16<S::around>(to + row * S::row_stride + byte, cache + first + byte,
                               from >= 0);
    }
    find(next_position);
    next_position = position_of(tile + 2);
  }
};

// The query as mma's left operand, the same in all warps. Where the output of large heads
// fills the registers, it stays in shared memory, each lane's part of a step together.
template <class S>
struct Query {
  uint32_t in_registers[S::query_in_shared ? 1 : S::steps][4] = {};

  TIDAL_DEVICE static uint32_t* in_shared(int step) {
    char* const queries = shared_memory() + S::warps * S::stages * S::stage_bytes;
    return reinterpret_cast<uint32_t*>(queries) + (step * 32 + thread_index() % 32) * 4;
  }

  TIDAL_DEVICE void load(const AttendParams& p, const Share& share) {
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      if constexpr (!S::query_in_shared) {
        load_step(p, share, step, in_registers[step]);
      } else if (step % S::warps == thread_index() / 32) {
        uint32_t part[4];
        load_step(p, share, step, part);
#pragma unroll
        for (int r = 0; r < 4; ++r) in_shared(step)[r] = part[r];
      }
    }
    if constexpr (S::query_in_shared) sync_block();
  }

  TIDAL_DEVICE static void load_step(const AttendParams& p, const Share& share, int step,
                                     uint32_t (&to)[4]) {
    const uint16_t* rows = static_cast<const uint16_t*>(p.query) +
                           share.row * p.query_row + share.head * p.query_head;
    const int head = thread_index() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[r] = 0;
      if (head + 8 * (r % 2) < share.heads) {
        const uint16_t* row = rows + (head + 8 * (r % 2)) * p.query_head;
        to[r] = row[query_dim<S>(step, r / 2, 0)] |
                uint32_t{row[query_dim<S>(step, r / 2, 1)]} << 16;
      }
    }
  }

  TIDAL_DEVICE void get(int step, uint32_t (&to)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if constexpr (S::query_in_shared) {
        to[r] = in_shared(step)[r];
      } else {
        to[r] = in_registers[step][r];
      }
    }
  }
};

// scores[tile][r]: of 8 tokens each, in the layout of mma's c, in units of log2.
template <class S>
TIDAL_DEVICE void score(const char* stage, const Query<S>& query, float scale,
                        float (&scores)[2][4]) {
  using T = typename S::T;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int r = 0; r < 4; ++r) scores[0][r] = scores[1][r] = 0.f;
  if constexpr (S::fp8) {
    // Matrices: tokens 0-7 and 8-15 of one step, the same of the next.
    const char* from = stage + lane % 16 * S::row_stride + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < S::steps; step += 2) {
      uint32_t bytes[4], part[4], even, odd;
      ldmatrix_x4(bytes, from + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i % 2 == 0) query.get(step + i / 2, part);
        widen<T>(bytes[i], even, odd);
        mma(T{}, scores[i % 2], part, even, odd);
      }
    }
  } else {
    // Matrices: the halves of a step for tokens 0-7, then for 8-15.
    const int token = lane / 16 * 8 + lane % 8;
    const char* from = stage + token * S::row_stride + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      uint32_t keys[4], part[4];
      query.get(step, part);
      ldmatrix_x4(keys, from + step * 32);
      mma(T{}, scores[0], part, keys[0], keys[1]);
      mma(T{}, scores[1], part, keys[2], keys[3]);
    }
  }
  const unsigned present = *reinterpret_cast<const unsigned*>(stage + S::row_bytes);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = tile * 8 + lane % 4 * 2 + r % 2;
      scores[tile][r] = present >> token & 1 ? scores[tile][r] * scale : kMinusInfinity;
    }
  }
}

TIDAL_DEVICE float or_zero_if_empty(float top) {
  return top == kMinusInfinity ? 0.f : top;
}

// Adds the tile's weights to the state's sums. `tops` and `sums`: of this tile alone, the
// sums this lane's part. From here on what the state had counts `keep` times as much,
// the tile's `take` times.
template <class S>
TIDAL_DEVICE void add_weights(const float (&tops)[2], const float (&sums)[2],
                              State<S>& state, float (&keep)[2], float (&take)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float top = tops[half] > state.top[half] ? tops[half] : state.top[half];
    keep[half] = exp2_of(state.top[half] - or_zero_if_empty(top));
    take[half] = exp2_of(tops[half] - or_zero_if_empty(top));
    state.top[half] = top;
    state.sum[half] = state.sum[half] * keep[half] + sums[half] * take[half];
  }
}

// Adds the tile's values; `weights` relative to its own largest score.
template <class S>
TIDAL_DEVICE void add_values(const char* stage, const float (&weights)[2][4],
                             const float (&keep)[2], const float (&take)[2],
                             State<S>& state) {
  using T = typename S::T;
  if (ballot(keep[0] != 1.f || keep[1] != 1.f)) {
#pragma unroll
    for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
      for (int r = 0; r < 4; ++r) state.out[tile][r] *= keep[r / 2];
    }
  }
  uint32_t left[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int first = r % 2 * 2;
    left[r] = pack(T{}, weights[r / 2][first] * take[r % 2],
                   weights[r / 2][first + 1] * take[r % 2]);
  }
  const int lane = thread_index() % 32;
  const char* from = stage + S::value_byte + lane % 16 * S::row_stride + lane / 16 * 16;
  if constexpr (S::fp8) {
#pragma unroll
    for (int step = 0; step < S::steps; step += 2) {
      uint32_t bytes[4], even[4], odd[4];
      ldmatrix_x4_trans(bytes, from + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) widen<T>(bytes[i], even[i], odd[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma(T{}, state.out[2 * (step + i)], left, even[2 * i], even[2 * i + 1]);
        mma(T{}, state.out[2 * (step + i) + 1], left, odd[2 * i], odd[2 * i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, from + step * 32);
      mma(T{}, state.out[2 * step], left, values[0], values[1]);
      mma(T{}, state.out[2 * step + 1], left, values[2], values[3]);
    }
  }
}

template <class V>
TIDAL_DEVICE V largest_of_quad(V value) {
  V other = shuffle_xor(value, 1);
  value = other > value ? other : value;
  other = shuffle_xor(value, 2);
  return other > value ? other : value;
}

TIDAL_DEVICE float sum_of_quad(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// All tiles of this warp. `see(tile, scores, tops, sums, slot)` is called with each
// tile's scores and its first slot.
template <class S, class Slots, class See>
TIDAL_DEVICE void attend_tiles(const AttendParams& p, const Slots& slots,
                               const Share& share, State<S>& state, See&& see) {
  const int warp = thread_index() / 32;
  Loader<S, Slots> loader(p, slots, share);
#pragma unroll
  for (int tile = 0; tile < S::stages - 1; ++tile) {
    loader.copy(tile);
    commit_copies();
  }
  Query<S> query;
  query.load(p, share);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.top[half] = kMinusInfinity;
    state.sum[half] = 0.f;
  }
#pragma unroll
  for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r) state.out[tile][r] = 0.f;
  }
#pragma unroll 1
  for (int tile = 0; share.slot(warp, S::warps, tile) < share.end; ++tile) {
    wait_copies<S::stages - 2>();
    sync_warp();  // also: the stage that is filled next has been read by all lanes
    loader.copy(tile + S::stages - 1);
    commit_copies();
    const char* stage = loader.stage(tile);
    float scores[2][4], tops[2], sums[2] = {0.f, 0.f};
    score<S>(stage, query, p.scale_log2, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float a = scores[0][2 * half], b = scores[0][2 * half + 1];
      const float c = scores[1][2 * half], d = scores[1][2 * half + 1];
      const float ab = a > b ? a : b, cd = c > d ? c : d;
      tops[half] = largest_of_quad(ab > cd ? ab : cd);
    }
    float weights[2][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[i][r] = exp2_of(scores[i][r] - or_zero_if_empty(tops[r / 2]));
        sums[r / 2] += weights[i][r];
      }
    }
    see(tile, scores, tops, sums, share.slot(warp, S::warps, tile));
    float keep[2], take[2];
    add_weights<S>(tops, sums, state, keep, take);
    if constexpr (S::read_values) add_values<S>(stage, weights, keep, take, state);
  }
  wait_copies<0>();
}

// The row's, or the split's part of it.
TIDAL_DEVICE void write_lse(const AttendParams& p, const Share& share, int head,
                            float lse) {
  const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
  if (share.splits.used > 1) {
    p.partial_lse[at * p.split_capacity + share.split] = lse;
  } else {
    p.lse[at] = lse;
  }
}

template <class S>
TIDAL_DEVICE void write_output(const AttendParams& p, const Share& share, int head,
                               int dim, float first, float second) {
  if (share.splits.used > 1) {
    const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
    const int64_t part = at * p.split_capacity + share.split;
    p.partial_out[part * S::head_size + dim] = first;
    p.partial_out[part * S::head_size + dim + 1] = second;
    return;
  }
  const uint32_t pair = pack(typename S::T{}, first, second);
  uint16_t* output = static_cast<uint16_t*>(p.output) + share.row * p.output_row +
                     head * p.output_head + dim;
  output[0] = static_cast<uint16_t>(pair);
  output[1] = static_cast<uint16_t>(pair >> 16);
}

// Joins the warps' states and writes the result, or the split's part of it.
template <class S>
TIDAL_DEVICE void join_warps(const AttendParams& p, const Share& share,
                             const State<S>& state) {
  float* const outs = reinterpret_cast<float*>(shared_memory());
  float* const tops = outs + S::warps * kTileHeads * S::out_stride;
  float* const sums = tops + S::warps * kTileHeads;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  sync_block();  // the stages are reused
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp * kTileHeads + lane / 4 + 8 * half;
    const float sum = sum_of_quad(state.sum[half]);
    if (lane % 4 == 0) {
      tops[at] = state.top[half];
      sums[at] = sum;
    }
#pragma unroll
    for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        outs[at * S::out_stride + output_dim<S>(tile, i)] = state.out[tile][2 * half + i];
      }
    }
  }
  sync_block();
  constexpr int kPairs = S::read_values ? S::head_size / 2 : 1;
#pragma unroll 1
  for (int i = thread_index(); i < share.heads * kPairs; i += S::threads) {
    const int head = i / kPairs, dim = i % kPairs * 2;
    float top = kMinusInfinity;
    for (int w = 0; w < S::warps; ++w) {
      const float other = tops[w * kTileHeads + head];
      top = other > top ? other : top;
    }
    float sum = 0.f, out[2] = {0.f, 0.f};
    for (int w = 0; w < S::warps; ++w) {
      const int at = w * kTileHeads + head;
      const float weight = exp2_of(tops[at] - or_zero_if_empty(top));
      sum += weight * sums[at];
      if constexpr (S::read_values) {
        out[0] += weight * outs[at * S::out_stride + dim];
        out[1] += weight * outs[at * S::out_stride + dim + 1];
      }
    }
    const bool empty = sum == 0.f;
    if (dim == 0) {
      const float lse = empty ? kMinusInfinity : (top + log2_of(sum)) * kLn2;
      write_lse(p, share, share.head + head, lse);
    }
    if constexpr (S::read_values) {
      const float factor = empty ? 0.f : p.v_scale / sum;
      write_output<S>(p, share, share.head + head, dim, out[0] * factor,
                      out[1] * factor);
    }
  }
}

// Calls launch(shape) with the Shape that fits.
template <bool kReadValues, class T, class Stored, class Launch>
void for_head_size(const AttendParams& p, Launch&& launch) {
  switch (p.head_size) {
    case 64:
      return launch(Shape<T, Stored, 64, kReadValues>{});
    case 96:
      return launch(Shape<T, Stored, 96, kReadValues>{});
    case 128:
      return launch(Shape<T, Stored, 128, kReadValues>{});
    case 256:
      return launch(Shape<T, Stored, 256, kReadValues>{});
  }
  throw std::logic_error("a head_size that the checks let pass has no kernel");
}

template <bool kReadValues, class Launch>
void for_shape(const AttendParams& p, Launch&& launch) {
  const bool fp8 = p.stored == Element::kFp8E4m3;
  if (p.element == Element::kBf16) {
    return fp8 ? for_head_size<kReadValues, bf16, fp8_e4m3>(p, launch)
               : for_head_size<kReadValues, bf16, bf16>(p, launch);
  }
  return fp8 ? for_head_size<kReadValues, fp16, fp8_e4m3>(p, launch)
             : for_head_size<kReadValues, fp16, fp16>(p, launch);
}

}  // namespace tidal
