// Division by a number that the host knows, without the GPU's slow integer division.
#pragma once

#include <cstdint>

#include "splits.h"

namespace tidal {

// Divides numbers from 0 to 2**31 - 1 by `value`, from 1 to 2**31 - 1, exactly.
//
// With s = ceil(log2(value)) and m = ceil(2**(31 + s) / value), n * m / 2**(31 + s) is
// n / value plus an error below n / 2**31 / value < 1 / value, which rounding down drops.
struct Divisor {
  int value = 1;
  uint32_t multiplier = 1u << 31;  // m
  int shift = 0;                   // s

  Divisor() = default;
  explicit Divisor(int value) : value(value) {
    while (int64_t{1} << shift < value) ++shift;
    multiplier = static_cast<uint32_t>(ceil_div(int64_t{1} << 31 << shift, int64_t{value}));
  }

  TIDAL_HOST_DEVICE int quotient(int n) const {
    const uint64_t product = uint64_t{2u * static_cast<uint32_t>(n)} * multiplier;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift);
  }
};

}  // namespace tidal
