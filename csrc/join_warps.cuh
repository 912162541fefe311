// The end of a thread block's work: the results of its warps become one.
#pragma once

#include "arrivals.cuh"
#include "merge_splits.cuh"

namespace tidal {

// Writes the lse of a row, or of this split of it.
TIDAL_DEVICE void write_lse(const AttendParams& p, const Share& share, int head, float lse) {
  const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
  if (share.splits.used > 1) {
    publish(p.partial_lse + at * p.split_capacity + share.split, lse);
  } else {
    p.lse[at] = lse;
  }
}

// Writes four neighbouring dims of the output of a row, or of this split of it.
template <class S>
TIDAL_DEVICE void write_output(const AttendParams& p, const Share& share, int head, int dim,
                               const float (&out)[4]) {
  if (share.splits.used > 1) {
    const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
    const int64_t partial = at * p.split_capacity + share.split;
    publish_quad(p.partial_out + partial * S::head_size + dim, out);
  } else {
    write_row<S>(p, share.row, head, dim, out);
  }
}

// Joins what the warps attended to, and writes it. Where the row was split, the last of
// its thread blocks then writes the row.
template <class S>
TIDAL_DEVICE void join_warps(const AttendParams& p, const Share& share,
                       const OnlineSoftmax<S>& softmax) {
  float* const outs = reinterpret_cast<float*>(shared_memory());
  float* const maxima = outs + S::warps * kTileHeads * S::out_stride;
  float* const sums = maxima + S::warps * kTileHeads;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  sync_block();  // these floats overwrite the tiles, which all warps must have read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = warp * kTileHeads + lane / 4 + 8 * half;
    const float sum = sum_of_quad(softmax.sum[half]);
    if (lane % 4 == 0) {
      maxima[at] = softmax.max[half];
      sums[at] = sum;
    }
#pragma unroll
    for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        outs[at * S::out_stride + output_dim<S>(tile, i)] =
            softmax.out[tile][2 * half + i];
      }
    }
  }
  sync_block();
  constexpr int kQuads = S::read_values ? S::head_size / 4 : 1;
#pragma unroll 1
  for (int i = thread_index(); i < share.num_heads * kQuads; i += S::threads) {
    const int head = i / kQuads, dim = i % kQuads * 4;
    float max = kMinusInfinity;
    for (int w = 0; w < S::warps; ++w) {
      const float other = maxima[w * kTileHeads + head];
      max = other > max ? other : max;
    }
    float sum = 0.f, out[4] = {};
    for (int w = 0; w < S::warps; ++w) {
      const int at = w * kTileHeads + head;
      const float weight = exp2_of(maxima[at] - or_zero_if_empty(max));
      sum += weight * sums[at];
      if constexpr (S::read_values) {
#pragma unroll
        for (int d = 0; d < 4; ++d) out[d] += weight * outs[at * S::out_stride + dim + d];
      }
    }
    const bool empty = sum == 0.f;
    if (dim == 0) {
      const float lse = empty ? kMinusInfinity : (max + log2_of(sum)) * kLn2;
      write_lse(p, share, share.first_head + head, lse);
    }
    if constexpr (S::read_values) {
      const float factor = empty ? 0.f : p.v_scale / sum;
#pragma unroll
      for (int d = 0; d < 4; ++d) out[d] *= factor;
      write_output<S>(p, share, share.first_head + head, dim, out);
    }
  }
  if (share.splits.used <= 1) return;
  const int64_t counter = static_cast<int64_t>(share.row) * p.num_heads + share.first_head;
  if (arrives_last(p.arrivals + counter, share.splits.used)) merge_splits<S>(p, share);
}

}  // namespace tidal
