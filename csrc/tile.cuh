// How a tile lies in shared memory, which element each register of mma holds, and how
// fp8 numbers become operands.
//
// A tile is K and V of 16 tokens, or K alone. Heads are the rows of mma.m16n8k16, tokens
// its columns for q.k and its depth for p.v.
//
// NOTE: fp8 numbers are loaded as 16-bit pairs and widened in registers, even bytes into
// one operand and odd bytes into another. So fp8 changes the order in which q.k adds the
// dims up, and two neighbouring tiles of the output interleave; `query_dim` and
// `output_dim` give the dim of each register.
#pragma once

#include <stdexcept>

#include "params.h"
#include "primitives.cuh"

namespace tidal {

inline constexpr int kSharedLimit = 101376;  // bytes of a thread block on sm_89
inline constexpr int kMostStages = 6;
// Bytes after each token: eight tokens at a time are then read from distinct banks.
inline constexpr int kTokenPad = 16;

// The sizes that a kernel is compiled for. T: type of query and output. Stored: type of
// the KV cache. kReadValues: false in score_blocks, which has no V and no output.
template <class T_, class Stored_, int kHeadSize, bool kReadValues>
struct Shape {
  using T = T_;
  using Stored = Stored_;
  static constexpr int head_size = kHeadSize;
  static constexpr bool fp8 = sizeof(Stored) == 1;
  static constexpr bool read_values = kReadValues;
  static constexpr int warps = kHeadSize > 128 ? 2 : 4;
  static constexpr int threads = 32 * warps;
  static constexpr int steps = kHeadSize / 16;  // of 16 dims each, the depth of mma

  // One token of a tile.
  static constexpr int value_byte = kHeadSize * sizeof(Stored);  // where V begins
  static constexpr int token_bytes = kReadValues ? 2 * value_byte : value_byte;
  static constexpr int token_stride = token_bytes + kTokenPad;
  static constexpr int token_chunks = token_bytes / 16;  // copies of 16 bytes
  // Bytes that L2 fetches around a copy: few enough not to fetch an unwanted V.
  static constexpr int prefetch_bytes = kReadValues || token_bytes % 128 == 0 ? 128 : 64;

  // Shared memory: the stages of each warp's pipeline, one tile each, then the query.
  static constexpr int stage_bytes = kTileTokens * token_stride;
  static constexpr bool query_in_shared = kReadValues && kHeadSize > 128;
  static constexpr int query_bytes = query_in_shared ? steps * 32 * 16 : 0;
  static constexpr int stages =
      smaller(kMostStages, (kSharedLimit - query_bytes) / (warps * stage_bytes));
  // At the end the same memory holds every warp's result, to be joined.
  static constexpr int out_tiles = kReadValues ? 2 * steps : 0;       // of 8 dims each
  static constexpr int out_stride = kReadValues ? kHeadSize + 4 : 0;  // floats per head
  static constexpr int join_bytes = warps * kTileHeads * (out_stride + 2) * 4;
  static constexpr int shared_bytes =
      larger(warps * stages * stage_bytes + query_bytes, join_bytes);
  static_assert(kHeadSize % 32 == 0 && stages >= 2 && shared_bytes <= kSharedLimit);
  static_assert(kTileTokens * token_chunks % 32 == 0 && token_stride / 16 % 2 == 1);
};

// The dim that this lane's register of the query holds for step `step`; `pair` is 0 for
// the register of the lower dims and 1 for the other, `i` is the half of the register.
template <class S>
TIDAL_DEVICE int query_dim(int step, int pair, int i) {
  const int quad = thread_index() % 4;
  return step * 16 + (S::fp8 ? 4 * quad + pair + 2 * i : 2 * quad + 8 * pair + i);
}

// The dim that register r % 2 of output tile `tile` holds in this lane.
template <class S>
TIDAL_DEVICE int output_dim(int tile, int r) {
  const int quad = thread_index() % 4;
  return S::fp8 ? tile / 2 * 16 + 4 * quad + 2 * r + tile % 2 : tile * 8 + 2 * quad + r;
}

// Widens bytes 0 and 2 of a word, both e4m3. Exact: exponent and mantissa are shifted
// into place, then rescaled.
TIDAL_DEVICE uint32_t widen(bf16, uint32_t bytes) {
  return times_2_to_120(bf16{}, (bytes & 0x007f007f) << 4 | (bytes & 0x00800080) << 8);
}
TIDAL_DEVICE uint32_t widen(fp16, uint32_t bytes) {
  return times_256(fp16{}, (bytes & 0x007f007f) << 7 | (bytes & 0x00800080) << 8);
}
// Widens four bytes of e4m3: bytes 0 and 2 to `even`, bytes 1 and 3 to `odd`; NaN stays
// NaN.
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
