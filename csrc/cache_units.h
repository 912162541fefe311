// The unit in which kernels count the places of tokens in the KV cache.
#pragma once

#include <cstdint>
#include <numeric>

#include "checks.h"

namespace tidal {

// The strides of blocks and tokens, in bytes, are multiples of `bytes`; so the place of
// any token is a number of units. A kernel then holds it in 32 bits.
struct CacheUnits {
  int64_t bytes, block, token;

  // `cache` is [B, Hkv, block_size, 2D] with elements of `element_bytes`.
  CacheUnits(const TensorView& cache, int element_bytes) {
    // A dimension of size 1 may have any stride: no index reaches the second element.
    const int64_t block_bytes = cache.size(0) > 1 ? cache.stride(0) * element_bytes : 0;
    const int64_t token_bytes = cache.size(2) > 1 ? cache.stride(2) * element_bytes : 0;
    bytes = std::gcd(block_bytes, token_bytes);
    if (bytes == 0) bytes = 16;
    block = block_bytes / bytes;
    token = token_bytes / bytes;
  }

  // The last place must fit 32 bits, where the largest number means "no token".
  void check(const Checks& checks, const TensorView& cache) const {
    constexpr int64_t most = 0xfffffffe;
    const int64_t last = (cache.size(0) - 1) * block + (cache.size(2) - 1) * token;
    checks.that(bytes <= most && last <= most, "kv_cache.size(0)", cache.size(0),
                "a cache that spans 2**32 - 1 of the common divisor of its strides, " +
                    std::to_string(bytes) + " bytes");
  }
};

}  // namespace tidal
