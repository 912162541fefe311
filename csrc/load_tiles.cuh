// The way of K, V and the query from global memory to the operands of mma.
#pragma once

#include "fp8.cuh"
#include "share.cuh"
#include "tile.cuh"

namespace tidal {

// The token that a lane looks up next. Its address takes two loads, the second of which
// needs the first: the chosen block (where sparse), then the block table.
struct TokenLookup {
  int entry;   // -1: there is no such token
  int chosen;  // what Entries::chosen read
  int token;   // its place in its KV block; -1: there is no such token
  int block;   // physical

  template <class Entries>
  TIDAL_DEVICE void read_chosen(const Entries& entries, int of_entry) {
    entry = of_entry;
    chosen = entry < 0 ? 0 : entries.chosen(entry);
  }

  template <class Entries>
  TIDAL_DEVICE void read_block(const AttendParams& p, const Entries& entries,
                               const int* table) {
    const int position = entry < 0 ? -1 : entries.position(entry, chosen);
    token = -1;
    block = 0;
    if (position >= 0) {
      const int logical = p.by_block_size.quotient(position);
      token = position - logical * p.block_size;
      block = table[logical];
    }
  }

  // Where the token lies, in units of the cache; kNoPlace if there is no such token.
  TIDAL_DEVICE uint32_t place(const AttendParams& p) const {
    if (token < 0) return kNoPlace;
    return block * p.cache_block_units + token * p.cache_token_units;
  }
};

// Copies the tiles of one warp to its stages in shared memory. The warp's 32 lanes look
// up the 32 tokens of two tiles at once. The places of the first tiles are all read
// together; after that the block table is read one pair of tiles before it is needed, and
// the chosen blocks one pair before that.
template <class S, class Entries>
struct TileLoader {
  static constexpr int kFirstPairs = S::stages / 2;  // that hold the first stages - 1 tiles

  const AttendParams& p;
  const Entries& entries;
  const Share& share;
  const char* cache;  // of the heads' KV head
  const int* table;   // the row's line of the block table
  int first_stage;    // this warp's, a byte of shared memory
  int stage;          // that is filled next
  uint32_t place;     // of this lane's token of the pair that is copied
  TokenLookup next, after_next;

  TIDAL_DEVICE TileLoader(const AttendParams& p, const Entries& entries, const Share& share)
      : p(p), entries(entries), share(share) {
    cache = static_cast<const char*>(p.kv_cache) +
            share.first_head / p.heads_per_kv_head * p.cache_head_stride *
                int64_t{sizeof(typename S::Stored)};
    if constexpr (S::whole_tokens) cache += S::copied_byte(0, thread_index() % 32);
    cache = opaque(cache);
    table = p.block_table + share.row * p.block_table_row_stride;
    first_stage = thread_index() / 32 * S::stages * S::stage_bytes;
    stage = first_stage;
  }

  // Copies the first stages - 1 tiles.
  TIDAL_DEVICE void start() {
    TokenLookup first[kFirstPairs + 2];
#pragma unroll
    for (int pair = 0; pair < kFirstPairs + 2; ++pair) {
      first[pair].read_chosen(entries, entry_of(pair));
    }
#pragma unroll
    for (int pair = 0; pair < kFirstPairs + 1; ++pair) {
      first[pair].read_block(p, entries, table);
    }
#pragma unroll
    for (int tile = 0; tile < S::stages - 1; ++tile) {
      place = first[tile / 2].place(p);
      copy_placed(tile % 2);
    }
    next = first[kFirstPairs];
    after_next = first[kFirstPairs + 1];
  }

  // Copies the warp's tile number `tile`, each in its turn.
  TIDAL_DEVICE void copy(int tile) {
    if (tile % 2 == 0) {
      place = next.place(p);
      next = after_next;
      next.read_block(p, entries, table);
      after_next.read_chosen(entries, entry_of(tile / 2 + 2));
    }
    copy_placed(tile % 2);
  }

  // The stage after the given one.
  TIDAL_DEVICE int stage_after(int stage) const {
    const bool last = stage == first_stage + (S::stages - 1) * S::stage_bytes;
    return last ? first_stage : stage + S::stage_bytes;
  }

 private:
  // This lane's entry of a pair of tiles, or -1.
  TIDAL_DEVICE int entry_of(int pair) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int entry =
        share.tile_begin(warp, S::warps, pair * 2 + lane / 16) + lane % kTileTokens;
    return entry < share.end ? entry : -1;
  }

  // Starts to copy a tile, the first or second of its pair, and closes the group of
  // copies. A token that does not exist becomes zeros.
  TIDAL_DEVICE void copy_placed(int of_pair) {
    const int lane = thread_index() % 32;
    char* const to = shared_memory() + stage;
    stage = stage_after(stage);
    const unsigned present = ballot(place != kNoPlace) >> of_pair * 16 & 0xffff;
    if (lane / 16 == of_pair) store(to + S::place_byte(lane % 16), place);
    if (lane == 0) store(to + S::present_byte, present);
    sync_warp();  // all lanes read what some have stored
    if constexpr (S::whole_tokens) {
      constexpr int kFours = S::lane_tokens / 4;
      Places places[kFours];
      const char* const from = to + S::place_byte(S::copied_token(0, lane));
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        places[i] = *reinterpret_cast<const Places*>(from + i * S::token_stride);
      }
#pragma unroll
      for (int i = 0; i < S::tile_copies; ++i) {
        const int token = i / S::copies_per_token;  // of this lane's
        copy_chunk(to, i, i % S::copies_per_token * 512, places[token / 4].of[token % 4]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::tile_copies; ++i) {
        const char* const at = to + S::place_byte(S::copied_token(i, lane));
        const uint32_t from = *reinterpret_cast<const uint32_t*>(at);
        copy_chunk(to, i, S::copied_byte(i, lane), from);
      }
    }
    commit_copies();
  }

  // Starts the i-th copy of a tile: 16 bytes, from `byte` behind this lane's `cache`.
  TIDAL_DEVICE void copy_chunk(char* to, int i, int byte, uint32_t from) const {
    const int lane = thread_index() % 32;
    to += S::copied_token(i, lane) * S::token_stride + S::copied_byte(i, lane);
    const char* const token = cache + uint64_t{from} * p.cache_unit_bytes;
    copy_async_16<S::prefetch_bytes>(to, token + byte, from != kNoPlace);
  }

  TIDAL_DEVICE static void store(char* to, uint32_t value) {
    *reinterpret_cast<uint32_t*>(to) = value;
  }
};

// The query as mma's left operand, the same in all warps. It lies in registers; where the
// output of large heads fills those, it lies in shared memory, ordered by step and lane.
template <class S>
struct Query {
  uint32_t in_registers[S::query_in_shared ? 1 : S::steps][4] = {};
  HeadScale scales[2];  // of heads lane / 4 and lane / 4 + 8

  TIDAL_DEVICE static uint32_t* in_shared(int step) {
    char* const queries = shared_memory() + S::warps * S::stages * S::stage_bytes;
    return reinterpret_cast<uint32_t*>(queries) + (step * 32 + thread_index() % 32) * 4;
  }

  TIDAL_DEVICE void load(const AttendParams& p, const Share& share) {
    if constexpr (S::query_to_fp16) find_scales(p, share);
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      if (S::query_in_shared && step % S::warps != thread_index() / 32) continue;
      uint32_t left[4];
      load_step(p, share, step, left);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if constexpr (S::query_to_fp16) left[r] = scales[r % 2].convert(left[r]);
        (S::query_in_shared ? in_shared(step) : in_registers[step])[r] = left[r];
      }
    }
    if constexpr (S::query_in_shared) sync_block();
  }

  TIDAL_DEVICE void find_scales(const AttendParams& p, const Share& share) {
    unsigned largest[2] = {0, 0};
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      uint32_t left[4];
      load_step(p, share, step, left);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        largest[r % 2] = larger_magnitude(largest[r % 2], left[r]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Four lanes hold the dims of a head.
      for (int mask = 1; mask < 4; mask *= 2) {
        largest[half] = larger_magnitude(largest[half], shuffle_xor(largest[half], mask));
      }
      scales[half] = HeadScale(largest[half]);
    }
  }

  // What q.k of a head is multiplied by.
  TIDAL_DEVICE float scale(const AttendParams& p, int half) const {
    return S::query_to_fp16 ? p.scale_log2 * scales[half].inverse : p.scale_log2;
  }

  TIDAL_DEVICE static void load_step(const AttendParams& p, const Share& share, int step,
                               uint32_t (&to)[4]) {
    const uint16_t* heads = static_cast<const uint16_t*>(p.query) +
                            share.row * p.query_row_stride +
                            share.first_head * p.query_head_stride;
    const int head = thread_index() % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      to[r] = 0;
      if (head + 8 * (r % 2) < share.num_heads) {
        const uint16_t* dims = heads + (head + 8 * (r % 2)) * p.query_head_stride;
        to[r] = dims[query_dim<S>(step, r / 2, 0)] |
                uint32_t{dims[query_dim<S>(step, r / 2, 1)]} << 16;
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

}  // namespace tidal
