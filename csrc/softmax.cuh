// The softmax that is computed tile by tile ("online"), and the reductions it needs. All
// in powers of two: scores arrive multiplied by log2(e).
#pragma once

#include "primitives.cuh"

namespace tidal {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();

// What a warp has attended to so far: the output is out / sum, and sum and out are
// relative to 2**max.
template <class S>
struct OnlineSoftmax {
  float max[2];  // of heads lane / 4 and lane / 4 + 8
  float sum[2];  // this lane's part of the sum
  float out[S::read_values ? S::out_tiles : 1][4];

  TIDAL_DEVICE void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = kMinusInfinity;
      sum[half] = 0.f;
    }
#pragma unroll
    for (int tile = 0; tile < S::out_tiles; ++tile) {
#pragma unroll
      for (int r = 0; r < 4; ++r) out[tile][r] = 0.f;
    }
  }
};

// A maximum to subtract: 0 where there was no score, so that nothing becomes NaN.
TIDAL_DEVICE float or_zero_if_empty(float max) {
  return max == kMinusInfinity ? 0.f : max;
}

// Over the four lanes that hold the scores of one head.
TIDAL_DEVICE float largest_of_quad(float value) {
  value = larger_of(value, shuffle_xor(value, 1));
  return larger_of(value, shuffle_xor(value, 2));
}

TIDAL_DEVICE float sum_of_quad(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Adds a tile's weights to the sums. `maxima` and `sums` are of this tile alone, `sums`
// being this lane's part. Sets `keep` and `take`: what the earlier tiles' output and this
// tile's weights have to be multiplied by from here on.
template <class S>
TIDAL_DEVICE void add_weights(const float (&maxima)[2], const float (&sums)[2],
                        OnlineSoftmax<S>& softmax, float (&keep)[2], float (&take)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float max = larger_of(maxima[half], softmax.max[half]);
    keep[half] = exp2_of(softmax.max[half] - or_zero_if_empty(max));
    take[half] = exp2_of(maxima[half] - or_zero_if_empty(max));
    softmax.max[half] = max;
    softmax.sum[half] = softmax.sum[half] * keep[half] + sums[half] * take[half];
  }
}

}  // namespace tidal
