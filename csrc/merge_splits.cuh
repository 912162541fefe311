// The end of a row that was split: the last of its thread blocks joins the results of all
// splits, weighed by their lse and added in the order of the splits. So it does not matter
// which one is last.
#pragma once

#include "share.cuh"
#include "softmax.cuh"
#include "tile.cuh"

namespace tidal {

inline constexpr int kMergeDepth = 16;  // splits whose outputs a thread loads at once
static_assert(kMostSplits % 32 == 0 && kMostSplits % kMergeDepth == 0);

// Writes four neighbouring dims of the output of a row.
template <class S>
TIDAL_DEVICE void write_row(const AttendParams& p, int row, int head, int dim,
                            const float (&out)[4]) {
  uint16_t* to = static_cast<uint16_t*>(p.output) + row * p.output_row_stride +
                 head * p.output_head_stride + dim;
#pragma unroll
  for (int d = 0; d < 4; d += 2) {
    const uint32_t pair = pack(typename S::T{}, out[d], out[d + 1]);
    to[d] = static_cast<uint16_t>(pair);
    to[d + 1] = static_cast<uint16_t>(pair >> 16);
  }
}

// Writes the lse of one head, and to `weights` what its splits' outputs have to be
// multiplied by: kMostSplits numbers, zeros behind the last split. Called by one warp.
TIDAL_DEVICE void weigh_splits(const AttendParams& p, int64_t head, int used,
                               float* weights) {
  constexpr int kEach = kMostSplits / 32;
  const int lane = thread_index() % 32;
  const float* lses = p.partial_lse + head * p.split_capacity;
  float lse[kEach], max = kMinusInfinity;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int split = i * 32 + lane;
    lse[i] = split < used ? read_published(lses + split) : kMinusInfinity;
    max = lse[i] > max ? lse[i] : max;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float other = shuffle_xor(max, step);
    max = other > max ? other : max;
  }
  const float base = or_zero_if_empty(max);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    lse[i] = exp2_of((lse[i] - base) * kLog2E);
    sum += lse[i];
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += shuffle_xor(sum, step);
  if (lane == 0) p.lse[head] = sum == 0.f ? kMinusInfinity : base + log2_of(sum) * kLn2;
  const float factor = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
  for (int i = 0; i < kEach; ++i) weights[i * 32 + lane] = lse[i] * factor;
}

// Writes lse and output of this thread block's heads. Precondition: arrives_last was true.
template <class S>
TIDAL_DEVICE void merge_splits(const AttendParams& p, const Share& share) {
  static_assert(S::shared_bytes >= kTileHeads * kMostSplits * int{sizeof(float)});
  float* const weights = reinterpret_cast<float*>(shared_memory());
  const int64_t first = static_cast<int64_t>(share.row) * p.num_heads + share.first_head;
  const int used = share.splits.used;
  for (int head = thread_index() / 32; head < share.num_heads; head += S::warps) {
    weigh_splits(p, first + head, used, weights + head * kMostSplits);
  }
  if constexpr (S::read_values) {
    sync_block();
    constexpr int kQuads = S::head_size / 4;
    for (int i = thread_index(); i < share.num_heads * kQuads; i += S::threads) {
      const int head = i / kQuads, dim = i % kQuads * 4;
      const float* outs =
          p.partial_out + (first + head) * p.split_capacity * S::head_size + dim;
      float out[4] = {};
#pragma unroll 1
      for (int split = 0; split < used; split += kMergeDepth) {
        float parts[kMergeDepth][4] = {};
#pragma unroll
        for (int j = 0; j < kMergeDepth; ++j) {
          if (split + j >= used) continue;
          read_published_quad(parts[j], outs + int64_t{split + j} * S::head_size);
        }
#pragma unroll
        for (int j = 0; j < kMergeDepth; ++j) {
          const float weight = weights[head * kMostSplits + split + j];
#pragma unroll
          for (int d = 0; d < 4; ++d) out[d] += weight * parts[j][d];
        }
      }
      write_row<S>(p, share.row, share.first_head + head, dim, out);
    }
  }
}

}  // namespace tidal
