// How fp8 numbers, and the query beside them, become fp16 operands of mma.
#pragma once

#include "primitives.cuh"

namespace tidal {

// Widens bytes 0 and 1 of a word, both e4m3, to two fp16: exponent and mantissa are
// shifted into place, then rescaled. Exact; NaN stays NaN.
TIDAL_DEVICE uint32_t widen_by_shifts(uint32_t bytes) {
  const uint32_t apart = permute_bytes(bytes, 0, 0x4140);  // one in each half
  const uint32_t pair = times_256((apart & 0x007f007f) << 7 | (apart & 0x00800080) << 8);
  const uint32_t nan = ((apart & 0x007f007f) + 0x00010001) & 0x00800080;
  return pair | (nan >> 7) * 0x7fff;  // no branch: mma follows
}

TIDAL_DEVICE uint32_t widen_pair(uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return widen_by_shifts(bytes);
#else
  return convert_e4m3_pair(bytes);
#endif
}

// A bf16 number has a larger exponent than fp16 holds. So each head of the query is
// multiplied by a power of two that takes its largest number to between 2**15 and 2**16,
// and the head's scores by the inverse. That is exact for numbers down to 2**-32 of the
// head's largest; below that, the error is at most 2**-40 of the largest.
struct HeadScale {
  float to_fp16 = 1.f, inverse = 1.f;

  HeadScale() = default;
  // `largest` has the bits of the head's largest bf16 number, without the sign.
  TIDAL_DEVICE explicit HeadScale(unsigned largest) {
    // The exponent as stored. Below 16 the inverse would be no normal float; then the
    // largest number becomes smaller than 2**15.
    const unsigned stored = largest >> 7 > 16 ? largest >> 7 : 16;
    to_fp16 = float_of((127 + 15 + 127 - stored) << 23);
    inverse = float_of((stored - 15) << 23);
  }

  // Turns two bf16 numbers of the head into two fp16.
  TIDAL_DEVICE uint32_t convert(uint32_t pair) const {
    return pack(fp16{}, float_of(pair << 16) * to_fp16,
                float_of(pair & 0xffff0000) * to_fp16);
  }
};

TIDAL_DEVICE unsigned larger_magnitude(unsigned largest, uint32_t pair) {
  const unsigned low = pair & 0x7fff, high = pair >> 16 & 0x7fff;
  const unsigned of_pair = low > high ? low : high;
  return of_pair > largest ? of_pair : largest;
}

}  // namespace tidal
