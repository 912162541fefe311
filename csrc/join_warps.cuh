// The end of a thread block's work: the results of its warps become one.
#pragma once

#include "share.cuh"
#include "softmax.cuh"
#include "tile.cuh"

namespace tidal {

// Writes the lse of a row, or of this split of it.
TIDAL_DEVICE void write_lse(const AttendParams& p, const Share& share, int head, float lse) {
  const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
  if (share.splits.used > 1) {
    p.partial_lse[at * p.split_capacity + share.split] = lse;
  } else {
    p.lse[at] = lse;
  }
}

// Writes two neighbouring dims of the output of a row, or of this split of it.
template <class S>
TIDAL_DEVICE void write_output(const AttendParams& p, const Share& share, int head, int dim,
                         float first, float second) {
  if (share.splits.used > 1) {
    const int64_t at = static_cast<int64_t>(share.row) * p.num_heads + head;
    const int64_t partial = at * p.split_capacity + share.split;
    p.partial_out[partial * S::head_size + dim] = first;
    p.partial_out[partial * S::head_size + dim + 1] = second;
    return;
  }
  const uint32_t pair = pack(typename S::T{}, first, second);
  uint16_t* output = static_cast<uint16_t*>(p.output) + share.row * p.output_row_stride +
                     head * p.output_head_stride + dim;
  output[0] = static_cast<uint16_t>(pair);
  output[1] = static_cast<uint16_t>(pair >> 16);
}

// Joins what the warps attended to, and writes it.
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
  constexpr int kPairs = S::read_values ? S::head_size / 2 : 1;
#pragma unroll 1
  for (int i = thread_index(); i < share.num_heads * kPairs; i += S::threads) {
    const int head = i / kPairs, dim = i % kPairs * 2;
    float max = kMinusInfinity;
    for (int w = 0; w < S::warps; ++w) {
      const float other = maxima[w * kTileHeads + head];
      max = other > max ? other : max;
    }
    float sum = 0.f, out[2] = {0.f, 0.f};
    for (int w = 0; w < S::warps; ++w) {
      const int at = w * kTileHeads + head;
      const float weight = exp2_of(maxima[at] - or_zero_if_empty(max));
      sum += weight * sums[at];
      if constexpr (S::read_values) {
        out[0] += weight * outs[at * S::out_stride + dim];
        out[1] += weight * outs[at * S::out_stride + dim + 1];
      }
    }
    const bool empty = sum == 0.f;
    if (dim == 0) {
      const float lse = empty ? kMinusInfinity : (max + log2_of(sum)) * kLn2;
      write_lse(p, share, share.first_head + head, lse);
    }
    if constexpr (S::read_values) {
      const float factor = empty ? 0.f : p.v_scale / sum;
      write_output<S>(p, share, share.first_head + head, dim, out[0] * factor,
                      out[1] * factor);
    }
  }
}

}  // namespace tidal
