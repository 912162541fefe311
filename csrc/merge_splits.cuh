// merge_splits: the splits of each row become one result, weighed by their lse and added
// in order. Has run under the CPU emulation only, not yet on a GPU.
#pragma once

#include "share.cuh"
#include "softmax.cuh"

namespace tidal {

inline constexpr int kMergeThreads = 64;

// Grid: (heads, rows). A row of one split is left alone: its split has written the
// result. So is a row that is left out.
template <class T>
TIDAL_KERNEL(kMergeThreads, 1) merge_splits_kernel(const AttendParams p) {
  const int head = block_x(), row = block_y();
  const int entries = count_entries(p, row, head, p.seq_lens[row]);
  const int used = split_row(entries, grain_of(p), p.splits, p.min_split_tokens).used;
  if (used <= 1) return;
  const int64_t at = static_cast<int64_t>(row) * p.num_heads + head;
  const float* lses = p.partial_lse + at * p.split_capacity;
  float max = kMinusInfinity, sum = 0.f;
  for (int i = 0; i < used; ++i) max = lses[i] > max ? lses[i] : max;
  const float base = or_zero_if_empty(max);
  for (int i = 0; i < used; ++i) sum += exp2_of((lses[i] - base) * kLog2E);
  if (thread_index() == 0) {
    p.lse[at] = sum == 0.f ? kMinusInfinity : base + log2_of(sum) * kLn2;
  }
  if (p.output == nullptr) return;
  const float factor = sum == 0.f ? 0.f : 1.f / sum;
  const float* outs = p.partial_out + at * p.split_capacity * p.head_size;
  uint16_t* output = static_cast<uint16_t*>(p.output) + row * p.output_row_stride +
                     head * p.output_head_stride;
  for (int dim = 2 * thread_index(); dim < p.head_size; dim += 2 * kMergeThreads) {
    float out[2] = {0.f, 0.f};
#pragma unroll 4
    for (int i = 0; i < used; ++i) {
      const float weight = exp2_of((lses[i] - base) * kLog2E);
      out[0] += weight * outs[i * p.head_size + dim];
      out[1] += weight * outs[i * p.head_size + dim + 1];
    }
    const uint32_t pair = pack(T{}, out[0] * factor, out[1] * factor);
    output[dim] = static_cast<uint16_t>(pair);
    output[dim + 1] = static_cast<uint16_t>(pair >> 16);
  }
}

}  // namespace tidal
