// How a tile lies in shared memory, and which element each register of mma holds.
//
// A tile is K and V of 16 tokens, or K alone. Heads are the rows of mma.m16n8k16, tokens
// its columns for q.k and its depth for p.v.
//
// NOTE: fp8 numbers are loaded as 16-bit pairs and widened to fp16 in registers. So fp8
// changes the order in which q.k adds the dims up, and two neighbouring tiles of the
// output interleave, one of even dims and one of odd; `query_dim` and `output_dim` give
// the dim of each register.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "params.h"
#include "primitives.cuh"

namespace tidal {

// The most shared memory of one thread block in bytes. Registers leave room for
// kBlocksPerProcessor thread blocks on one processor. 99 KiB is the most that sm_89 and sm_120
// give a thread block, of 100 KiB of a processor. So one thread block runs there and on
// sm_80 (164 KiB), two on sm_90 and sm_100 (228 KiB). With heads of 128 and 2-byte
// elements these are three stages. For two stages, and two thread blocks on sm_80 or three
// on sm_90: -DTIDAL_SHARED_LIMIT=76800 -DTIDAL_BLOCKS_PER_PROCESSOR=3. An H100 takes the
// same time for it, and 1 to 7 % more for sparse_decode with few rows.
#ifndef TIDAL_SHARED_LIMIT
#define TIDAL_SHARED_LIMIT 101376
#endif
inline constexpr int kSharedLimit = TIDAL_SHARED_LIMIT;
// Of score_blocks, which needs fewer registers: four thread blocks on sm_90, three stages.
inline constexpr int kScoreSharedLimit = smaller(57344, kSharedLimit);
inline constexpr int kScoreBlocksPerProcessor = 4;
inline constexpr int kMostStages = 6;
// That L2 fetches around a copy of K and V; 256 is 0 to 0.3 % slower on an H100.
inline constexpr int kPrefetchBytes = 128;
// Bytes after each token: eight tokens at a time are then read from distinct banks.
inline constexpr int kTokenPad = 16;

// In place of a token's place in the cache: there is no such token.
inline constexpr uint32_t kNoPlace = 0xffffffff;

// The places of up to four tokens.
struct alignas(16) Places {
  uint32_t of[4];
};

// The sizes that a kernel is compiled for. T: type of query and output. Stored: type of
// the KV cache. kReadValues: false in score_blocks, which has no V and no output.
template <class T_, class Stored_, int kHeadSize, bool kReadValues>
struct Shape {
  using T = T_;
  using Stored = Stored_;
  static constexpr int head_size = kHeadSize;
  static constexpr bool fp8 = sizeof(Stored) == 1;
  static constexpr bool read_values = kReadValues;
  using Operand = std::conditional_t<fp8, fp16, T>;  // of mma
  static constexpr bool query_to_fp16 = fp8 && std::is_same_v<T, bf16>;
  // The largest weight of a tile is 2 to this power. As fp16 loses what is below 2**-24,
  // this is nearly its largest power.
  static constexpr float weight_exponent = std::is_same_v<Operand, fp16> ? 15.f : 0.f;
  static constexpr int warps = kHeadSize > 128 ? 2 : 4;
  static constexpr int threads = 32 * warps;
  static constexpr int steps = kHeadSize / 16;  // of 16 dims each, the depth of mma

  // One token of a tile.
  static constexpr int value_byte = kHeadSize * sizeof(Stored);  // where V begins
  static constexpr int token_bytes = kReadValues ? 2 * value_byte : value_byte;
  static constexpr int token_stride = token_bytes + kTokenPad;
  static constexpr int token_chunks = token_bytes / 16;  // copies of 16 bytes
  // Bytes that L2 fetches around a copy: few enough not to fetch an unwanted V or token.
  static constexpr int prefetch_bytes =
      kReadValues && token_bytes % kPrefetchBytes == 0 ? kPrefetchBytes
      : kReadValues || token_bytes % 128 == 0          ? 128
                                                       : 64;

  // Shared memory: the stages of each warp's pipeline, one tile each, then the query.
  static constexpr int stage_bytes = kTileTokens * token_stride;
  static constexpr bool query_in_shared = kReadValues && kHeadSize > 128;
  static constexpr int query_bytes = query_in_shared ? steps * 32 * 16 : 0;
  static constexpr int shared_limit = kReadValues ? kSharedLimit : kScoreSharedLimit;
  static constexpr int blocks_per_processor =
      kReadValues ? kBlocksPerProcessor : kScoreBlocksPerProcessor;
  static constexpr int stages =
      smaller(kMostStages, (shared_limit - query_bytes) / (warps * stage_bytes));
  // A warp copies 512 bytes at a time. `lane` and `i` give the token and the byte in it
  // that a lane copies in the i-th copy of a tile.
  static constexpr int tile_copies = kTileTokens * token_chunks / 32;
  static constexpr int tokens_per_copy = token_chunks < 32 ? 32 / token_chunks : 1;
  static constexpr int copies_per_token = larger(1, token_chunks / 32);
  // Whether a lane copies the same dims of at least four tokens. Not so where a copy ends
  // within a token, as with heads of 96, or takes eight tokens.
  static constexpr bool whole_tokens =
      tokens_per_copy * token_chunks == 32 * copies_per_token && tokens_per_copy <= 4;

  TIDAL_DEVICE static int copied_token(int i, int lane) {
    if constexpr (!whole_tokens) return (i * 32 + lane) / token_chunks;
    return i / copies_per_token * tokens_per_copy + lane / smaller(32, token_chunks);
  }
  TIDAL_DEVICE static int copied_byte(int i, int lane) {
    if constexpr (!whole_tokens) return (i * 32 + lane) % token_chunks * 16;
    return i % copies_per_token * 512 + lane % smaller(32, token_chunks) * 16;
  }

  // The padding behind the first four tokens holds where the tokens of the tile lie in
  // the cache, ordered so that a lane finds those that it copies side by side.
  static constexpr int lane_tokens = whole_tokens ? kTileTokens / tokens_per_copy : 1;
  TIDAL_DEVICE static int place_byte(int token) {
    const int stride = kTileTokens / lane_tokens;
    const int at = whole_tokens ? token % stride * lane_tokens + token / stride : token;
    return at / 4 * token_stride + token_bytes + at % 4 * 4;
  }
  // The padding behind the fifth holds a bit mask of the tokens that exist.
  static constexpr int present_byte = 4 * token_stride + token_bytes;

  // At the end the same memory holds every warp's result, to be joined.
  static constexpr int out_tiles = kReadValues ? 2 * steps : 0;       // of 8 dims each
  static constexpr int out_stride = kReadValues ? kHeadSize + 4 : 0;  // floats per head
  static constexpr int join_bytes = warps * kTileHeads * (out_stride + 2) * 4;
  static constexpr int shared_bytes =
      larger(warps * stages * stage_bytes + query_bytes, join_bytes);
  static_assert(kHeadSize % 32 == 0 && stages >= 2 && shared_bytes <= shared_limit);
  static_assert(kTileTokens * token_chunks % 32 == 0 && token_stride / 16 % 2 == 1);
};

// The dim that this lane's register of the query holds for step `step`; `pair` is 0 for
// the register of the lower dims and 1 for the other, `i` is the half of the register.
template <class S>
TIDAL_DEVICE int query_dim(int step, int pair, int i) {
  const int quad = thread_index() % 4;
  return step * 16 + (S::fp8 ? 4 * quad + 2 * pair + i : 2 * quad + 8 * pair + i);
}

// The dim that register r % 2 of output tile `tile` holds in this lane.
template <class S>
TIDAL_DEVICE int output_dim(int tile, int r) {
  const int quad = thread_index() % 4;
  return S::fp8 ? tile / 2 * 16 + 4 * quad + 2 * r + tile % 2 : tile * 8 + 2 * quad + r;
}

// Calls launch(shape) with the Shape of the parameters' types and head size.
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
