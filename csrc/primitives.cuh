// The GPU instructions that the kernels use, as functions. Without a CUDA compiler
// tests/kernels/cuda/host/emulation.h provides the same names, so that the kernels run on
// a CPU.
#pragma once

#include <cstdint>

#include "splits.h"

namespace tidal {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Types of stored numbers. Arithmetic is in fp32, or inside mma.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp8_e4m3 {
  uint8_t bits;
};

}  // namespace tidal

#ifndef __CUDACC__
#include "emulation.h"
#else

// The most thread blocks of one kernel that the shared memory of a processor holds: three
// of score_blocks on sm_80, one of any kernel on sm_89 and sm_120. Registers need not be
// left for more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
#define TIDAL_MOST_BLOCKS 3
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
#define TIDAL_MOST_BLOCKS 1
#else
#define TIDAL_MOST_BLOCKS 32
#endif
#define TIDAL_KERNEL(threads, blocks_per_processor)                           \
  __global__ void __launch_bounds__(threads, (blocks_per_processor) < TIDAL_MOST_BLOCKS \
                                                 ? (blocks_per_processor)     \
                                                 : TIDAL_MOST_BLOCKS)
#define TIDAL_DEVICE __device__ __forceinline__

namespace tidal {

TIDAL_DEVICE int thread_index() { return threadIdx.x; }
TIDAL_DEVICE int block_x() { return blockIdx.x; }
TIDAL_DEVICE int block_y() { return blockIdx.y; }
TIDAL_DEVICE int block_z() { return blockIdx.z; }

TIDAL_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

TIDAL_DEVICE void sync_block() { __syncthreads(); }
// A barrier of the thread block that returns whether `yes` was true in any thread.
TIDAL_DEVICE bool any_in_block(bool yes) { return __syncthreads_or(yes); }
TIDAL_DEVICE void sync_warp() { __syncwarp(); }
TIDAL_DEVICE unsigned ballot(bool yes) { return __ballot_sync(~0u, yes); }
TIDAL_DEVICE int bit_count(unsigned bits) { return __popc(bits); }
TIDAL_DEVICE int lowest_bit(unsigned bits) { return __ffs(bits) - 1; }
template <class V>
TIDAL_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class V>
TIDAL_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
TIDAL_DEVICE void atomic_add_shared(int* address, int value) { atomicAdd(address, value); }
TIDAL_DEVICE void atomic_or_shared(unsigned* address, unsigned bits) {
  atomicOr(address, bits);
}
// Adds one to a counter in global memory, which becomes 0 after `most`; returns what it
// was.
TIDAL_DEVICE unsigned atomic_inc_wrapping(unsigned* counter, unsigned most) {
  return atomicInc(counter, most);
}

// Between kernels of one stream, for programmatic dependent launch (PTX ISA,
// "griddepcontrol"; sm_90 and later). A kernel that was launched so may start before the
// kernels in front of it have ended: every thread waits here before it reads or writes
// global memory, then all that they wrote is visible.
TIDAL_DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel of the stream start once all thread blocks of this one have called
// this, or have ended. Precondition: wait_for_earlier_kernels was called; so no kernel
// starts before the last but one in front of it has ended.
TIDAL_DEVICE void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Between thread blocks of one kernel. What a thread has written by `publish` can be read
// by `read_published` in another thread block that learns, through an atomic, that the
// writer has passed fence_device. Reads bypass L1, which other processors do not update.
TIDAL_DEVICE void fence_device() { __threadfence(); }
TIDAL_DEVICE void publish(float* to, float value) { *to = value; }
TIDAL_DEVICE void publish(int* to, int value) { *to = value; }
// Adds to a published number, whatever other threads add at the same time.
TIDAL_DEVICE void add_published(int* to, int value) { atomicAdd(to, value); }
TIDAL_DEVICE float read_published(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];"
               : "=f"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}
TIDAL_DEVICE int read_published(const int* from) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}
// The same for four neighbours at a multiple of 16 bytes.
TIDAL_DEVICE void publish_quad(float* to, const float (&values)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
}
TIDAL_DEVICE void read_published_quad(float (&to)[4], const float* from) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
}
// Reads four neighbours at a multiple of 16 bytes that no thread of this kernel writes.
TIDAL_DEVICE void load_quad(float (&to)[4], const float* from) {
  const float4 found = *reinterpret_cast<const float4*>(from);
  to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
}
// Writes a number of block_lse, or two neighbours at a multiple of 8 bytes. L2 keeps it
// longer than KV, which nobody reads again: select_blocks reads it next. On an H100
// dense_decode with scores of blocks of 16 takes 0.4 to 1.3 % less time for it; with blocks
// of 4, 2 % less where there is one row, else the same (docs/gpu_results.md).
TIDAL_DEVICE uint64_t policy_to_keep() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
TIDAL_DEVICE void store_score(float* to, float value) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "f"(value), "l"(policy_to_keep())
               : "memory");
}
TIDAL_DEVICE void store_scores(float* to, float first, float second) {
  asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(
                   __cvta_generic_to_global(to)),
               "f"(first), "f"(second), "l"(policy_to_keep())
               : "memory");
}

TIDAL_DEVICE unsigned float_bits(float value) { return __float_as_uint(value); }
TIDAL_DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
// Of a number and NaN: the number.
TIDAL_DEVICE float larger_of(float a, float b) { return fmaxf(a, b); }
TIDAL_DEVICE float exp2_of(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
TIDAL_DEVICE float log2_of(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Rounds two floats to nearest even and packs them, the first in the low half.
TIDAL_DEVICE uint32_t pack(bf16, float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
TIDAL_DEVICE uint32_t pack(fp16, float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Multiplies both halves, fp16, by 256, subnormal numbers included.
TIDAL_DEVICE uint32_t times_256(uint32_t pair) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0x5C005C00u));
  return result;
}
// Picks four of the eight bytes of (high, low), by one hexadecimal digit each.
TIDAL_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t digits) {
  return __byte_perm(low, high, digits);
}
// Converts bytes 0 and 1 of a word, both e4m3, to two fp16, exactly; NaN stays NaN. On
// sm_89 and later.
TIDAL_DEVICE uint32_t convert_e4m3_pair(uint32_t bytes) {
  uint32_t result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(static_cast<uint16_t>(bytes)));
  return result;
}

TIDAL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address
// of row l % 8 of matrix l / 8, and gets of each matrix elements 2 * (l % 4) and
// 2 * (l % 4) + 1 of row l / 4.
TIDAL_DEVICE void ldmatrix_x4(uint32_t (&to)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// Loads the same, each matrix transposed.
TIDAL_DEVICE void ldmatrix_x4_trans(uint32_t (&to)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Adds a[16, 16] * b[16, 8] to to[16, 8], in fp32.
TIDAL_DEVICE void mma(bf16, float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TIDAL_DEVICE void mma(fp16, float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hides from the compiler how a pointer came about. Otherwise it keeps what all threads
// have in common apart, and adds both parts up again at each use.
TIDAL_DEVICE const char* opaque(const char* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Starts to copy 16 bytes to shared memory; where `valid` is false it writes zeros and
// reads nothing. L2 fetches the aligned kBytes, 64, 128 or 256, around the 16.
//
// NOTE: no cache policy. ptxas 12.9 and 13.0 leave the policy's register out of LDGSTS,
// which is an illegal instruction on sm_90 (also IST-DASLab/marlin#44).
template <int kBytes>
TIDAL_DEVICE void copy_async_16(char* to, const char* from, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global.L2::%3B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0), "n"(kBytes)
      : "memory");
}
TIDAL_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` groups of this thread's copies are under way. The copies
// of other threads are visible only after a barrier that follows their waits.
template <int kPending>
TIDAL_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace tidal
#endif
