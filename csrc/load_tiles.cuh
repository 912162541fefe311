// The way of K, V and the query from global memory to the operands of mma.
#pragma once

#include "share.cuh"
#include "tile.cuh"

namespace tidal {

// Copies the tiles of one warp to its stages in shared memory. The address of a token
// takes two loads, the second of which needs the first (the chosen block, then the block
// table); so each of them starts one tile before its result is needed.
template <class S, class Entries>
struct TileLoader {
  const AttendParams& p;
  const Entries& entries;
  const Share& share;
  const char* cache;  // of the heads' KV head
  const int* table;   // the row's line of the block table
  char* stages;       // this warp's
  int next_position;
  // Of the token that this lane copies next: its place in its KV block (-1: there is no
  // such token), and the physical number of that block.
  int token, block;

  TIDAL_DEVICE TileLoader(const AttendParams& p, const Entries& entries, const Share& share)
      : p(p), entries(entries), share(share) {
    cache = static_cast<const char*>(p.kv_cache) +
            share.first_head / p.heads_per_kv_head * p.cache_head_stride *
                sizeof(typename S::Stored);
    table = p.block_table + share.row * p.block_table_row_stride;
    stages = shared_memory() + thread_index() / 32 * S::stages * S::stage_bytes;
    look_up(position_of(0));
    next_position = position_of(1);
  }

  // The position in the sequence of this lane's token of a tile, or -1.
  TIDAL_DEVICE int position_of(int tile) const {
    const int entry = share.tile_begin(thread_index() / 32, S::warps, tile) +
                      thread_index() % kTileTokens;
    return entry < share.end ? entries.position(entry) : -1;
  }

  TIDAL_DEVICE void look_up(int position) {
    const int logical = position < 0 ? 0 : position / p.block_size;
    token = position < 0 ? -1 : position - logical * p.block_size;
    block = position < 0 ? 0 : table[logical];
  }

  TIDAL_DEVICE char* stage(int tile) const {
    return stages + tile % S::stages * S::stage_bytes;
  }

  // Starts the copy of the warp's tile number `tile`. A token that does not exist becomes
  // zeros. The padding behind the first token holds a bit mask of the tokens that exist.
  TIDAL_DEVICE void copy(int tile) {
    const int lane = thread_index() % 32;
    int64_t offset = -1;
    if (token >= 0) offset = block * p.cache_block_stride + token * p.cache_token_stride;
    char* to = stage(tile);
    const unsigned present = ballot(token >= 0) & 0xffff;
    if (lane == 0) *reinterpret_cast<unsigned*>(to + S::token_bytes) = present;
#pragma unroll 4
    for (int i = 0; i < kTileTokens * S::token_chunks / 32; ++i) {
      const int chunk = i * 32 + lane;
      const int of_token = chunk / S::token_chunks, byte = chunk % S::token_chunks * 16;
      const int64_t from = shuffle(offset, of_token);
      const int64_t first = (from < 0 ? 0 : from) * int64_t{sizeof(typename S::Stored)};
      copy_async_16<S::prefetch_bytes>(to + of_token * S::token_stride + byte,
                                       cache + first + byte, from >= 0);
    }
    look_up(next_position);
    next_position = position_of(tile + 2);
  }
};

// The query as mma's left operand, the same in all warps. It lies in registers; where the
// output of large heads fills those, it lies in shared memory, ordered by step and lane.
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
        uint32_t left[4];
        load_step(p, share, step, left);
#pragma unroll
        for (int r = 0; r < 4; ++r) in_shared(step)[r] = left[r];
      }
    }
    if constexpr (S::query_in_shared) sync_block();
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
