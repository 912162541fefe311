// The main loop of dense_decode, score_blocks and sparse_decode: one thread block computes
// the attention of up to 16 query heads of one row over one split of its entries.
//
// Each warp takes tiles of its own, through an asynchronous pipeline of its own: no
// barrier of the thread block until join_warps. K and V of a token are copied together
// and read once for all heads of the thread block.
#pragma once

#include "load_tiles.cuh"
#include "softmax.cuh"

namespace tidal {

// Sets scores[half][r], in mma's layout of c, for tokens 0 to 7 and 8 to 15 of a tile:
// q.k times `scale`, or minus infinity for a token that does not exist.
template <class S>
TIDAL_DEVICE void score(const char* stage, const Query<S>& query, const float (&scale)[2],
                  float (&scores)[2][4]) {
  using Operand = typename S::Operand;
  const int lane = thread_index() % 32;
#pragma unroll
  for (int r = 0; r < 4; ++r) scores[0][r] = scores[1][r] = 0.f;
  if constexpr (S::fp8) {
    // The four matrices: tokens 0 to 7 and 8 to 15 of one step, then of the next.
    const char* from = stage + lane % 16 * S::token_stride + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < S::steps; step += 2) {
      uint32_t bytes[4], left[4];
      ldmatrix_x4(bytes, from + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i % 2 == 0) query.get(step + i / 2, left);
        mma(Operand{}, scores[i % 2], left, widen_pair(bytes[i]), widen_pair(bytes[i] >> 16));
      }
    }
  } else {
    // The four matrices: both halves of a step for tokens 0 to 7, then for 8 to 15.
    const int token = lane / 16 * 8 + lane % 8;
    const char* from = stage + token * S::token_stride + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      uint32_t keys[4], left[4];
      query.get(step, left);
      ldmatrix_x4(keys, from + step * 32);
      mma(Operand{}, scores[0], left, keys[0], keys[1]);
      mma(Operand{}, scores[1], left, keys[2], keys[3]);
    }
  }
  const unsigned present = *reinterpret_cast<const unsigned*>(stage + S::present_byte);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = half * 8 + lane % 4 * 2 + r % 2;
      const bool exists = present >> token & 1;
      scores[half][r] = exists ? scores[half][r] * scale[r / 2] : kMinusInfinity;
    }
  }
}

// Adds a tile's values to the output. `weights` are relative to the tile's own maximum;
// `keep` and `take` are what add_weights found.
template <class S>
TIDAL_DEVICE void add_values(const char* stage, const float (&weights)[2][4],
                       const float (&keep)[2], const float (&take)[2],
                       OnlineSoftmax<S>& softmax) {
  using Operand = typename S::Operand;
  if (ballot(keep[0] != 1.f || keep[1] != 1.f)) {
#pragma unroll
    for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
      for (int r = 0; r < 4; ++r) softmax.out[tile][r] *= keep[r / 2];
    }
  }
  uint32_t left[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int first = r % 2 * 2;
    left[r] = pack(Operand{}, weights[r / 2][first] * take[r % 2],
                   weights[r / 2][first + 1] * take[r % 2]);
  }
  const int lane = thread_index() % 32;
  const char* from = stage + S::value_byte + lane % 16 * S::token_stride + lane / 16 * 16;
  if constexpr (S::fp8) {
#pragma unroll
    for (int step = 0; step < S::steps; step += 2) {
      uint32_t bytes[4], even[4], odd[4];
      ldmatrix_x4_trans(bytes, from + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Bytes 0 and 1 are of one token, 2 and 3 of the next.
        const uint32_t by_dim = permute_bytes(bytes[i], 0, 0x3120);
        even[i] = widen_pair(by_dim);
        odd[i] = widen_pair(by_dim >> 16);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int tile = 2 * (step + i);
        mma(Operand{}, softmax.out[tile], left, even[2 * i], even[2 * i + 1]);
        mma(Operand{}, softmax.out[tile + 1], left, odd[2 * i], odd[2 * i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, from + step * 32);
      mma(Operand{}, softmax.out[2 * step], left, values[0], values[1]);
      mma(Operand{}, softmax.out[2 * step + 1], left, values[2], values[3]);
    }
  }
}

// Attends to all tiles of this warp. With each tile it calls on_scores(tile, scores,
// weights, maxima, sums, entry): the tile's number; its scores; exp2(score - maximum); the
// maximum, which is the largest score less S::weight_exponent, and this lane's part of the
// sum of weights, each for heads lane / 4 and lane / 4 + 8; the tile's first entry.
template <class S, class Entries, class OnScores>
TIDAL_DEVICE void attend_tiles(const AttendParams& p, const Entries& entries,
                         const Share& share, OnlineSoftmax<S>& softmax,
                         OnScores&& on_scores) {
  const int warp = thread_index() / 32;
  TileLoader<S, Entries> loader(p, entries, share);
  loader.start();
  Query<S> query;
  query.load(p, share);
  softmax.clear();
  const float scale[2] = {query.scale(p, 0), query.scale(p, 1)};
  int stage_byte = loader.first_stage;
#pragma unroll 1
  for (int tile = 0; share.tile_begin(warp, S::warps, tile) < share.end; ++tile) {
    wait_copies<S::stages - 2>();
    sync_warp();  // all lanes have also read the stage that is filled next
    loader.copy(tile + S::stages - 1);
    const char* const stage = shared_memory() + stage_byte;
    stage_byte = loader.stage_after(stage_byte);
    float scores[2][4], maxima[2], sums[2] = {0.f, 0.f};
    score<S>(stage, query, scale, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maxima[half] = largest_of_quad(
          larger_of(larger_of(scores[0][2 * half], scores[0][2 * half + 1]),
                    larger_of(scores[1][2 * half], scores[1][2 * half + 1])));
      maxima[half] -= S::weight_exponent;
    }
    float weights[2][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[i][r] = exp2_of(scores[i][r] - or_zero_if_empty(maxima[r / 2]));
        sums[r / 2] += weights[i][r];
      }
    }
    on_scores(tile, scores, weights, maxima, sums, share.tile_begin(warp, S::warps, tile));
    float keep[2], take[2];
    add_weights<S>(maxima, sums, softmax, keep, take);
    if constexpr (S::read_values) add_values<S>(stage, weights, keep, take, softmax);
  }
  wait_copies<0>();
}

}  // namespace tidal
