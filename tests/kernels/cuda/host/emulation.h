// The names of csrc/primitives.cuh, run on a CPU: each thread of a block is a fiber, and
// warp-wide instructions meet in a buffer, fragment by fragment as PTX defines them.
//
// The emulation is stricter than a GPU where that finds mistakes: shared memory starts as
// NaN; the target of an asynchronous copy is NaN until the copy was waited for, and
// reading it needs a barrier after that wait; addresses must be aligned; and a seed
// chooses the order in which thread blocks and threads run. What a thread publishes is
// seen by read_published alone, and only after the thread's fence, until the kernel ends:
// an ordinary load gets the old value, as from a stale L1. Guarded memory must not be
// touched before wait_for_earlier_kernels, which every thread has to call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define TIDAL_KERNEL(threads, blocks_per_processor) inline void
#define TIDAL_DEVICE inline

namespace tidal::emulation {

struct Dim {
  int x = 1, y = 1, z = 1;
};

// Runs `kernel` in every thread of every thread block of the grid.
void launch(Dim grid, int threads, int shared_bytes, const std::function<void()>& kernel);
// Schedule 0 runs the thread blocks one after the other and their threads in order, 1 in
// reverse. Any other number is a seed: thread blocks start in a random order, eight of
// them are under way at once, and their threads run in a new random order in each round.
void set_schedule(unsigned schedule);
// Memory that kernels must not touch before wait_for_earlier_kernels: AddressSanitizer
// reports who does.
void guard(void* memory, size_t bytes);

[[noreturn]] void fail(const char* format, ...);

int thread_index();
Dim block_index();
char* shared_memory();
void sync_block();
bool any_in_block(bool yes);
void sync_warp();
void wait_for_earlier_kernels();
void let_later_kernels_start();
void fence_device();
// Of published numbers of four bytes, each as a word.
void publish(void* to, uint32_t word);
void add_published(int* to, int value);
uint32_t read_published(const void* from);
unsigned atomic_inc_wrapping(unsigned* counter, unsigned most);
void check_quad(const float* address);
// Fails unless there was a barrier since the last wait for copies.
void check_readable(const char* what);
void copy_async(char* to, const char* from, bool valid);
void commit_copies();
void wait_copies(int pending);

inline constexpr int kSlotBytes = 64;
// Each of the 32 lanes hands in a value of `bytes` bytes and gets the slots of all lanes,
// which stay valid until the exchange after the next. `what` names the instruction, which
// must be the same in all lanes.
const char* exchange(const void* value, int bytes, const char* what);

template <class V>
V from_lane(const char* slots, int lane) {
  V value;
  std::memcpy(&value, slots + lane * kSlotBytes, sizeof(V));
  return value;
}

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t float_to_bfloat(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline float to_float(bf16, uint16_t bits) { return bfloat_to_float(bits); }
inline float to_float(fp16, uint16_t bits) { return half_to_float(bits); }
inline uint16_t from_float(bf16, float value) { return float_to_bfloat(value); }
inline uint16_t from_float(fp16, float value) { return float_to_half(value); }

void load_matrices(uint32_t (&to)[4], const char* row, bool transposed);

// to[16, 8] += a[16, 16] * b[16, 8]. PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type": half i of register r of lane l holds
//   of a: row l / 4 + 8 * (r % 2), column 2 * (l % 4) + i + 8 * (r / 2)
//   of b: row 2 * (l % 4) + i + 8 * r, column l / 4
// and register r of lane l holds of `to`: row l / 4 + 8 * (r / 2), column
// 2 * (l % 4) + r % 2.
template <class T>
void multiply(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace tidal::emulation

namespace tidal {

inline int thread_index() { return emulation::thread_index(); }
inline int block_x() { return emulation::block_index().x; }
inline int block_y() { return emulation::block_index().y; }
inline int block_z() { return emulation::block_index().z; }
inline char* shared_memory() { return emulation::shared_memory(); }
inline void sync_block() { emulation::sync_block(); }
inline bool any_in_block(bool yes) { return emulation::any_in_block(yes); }
inline void sync_warp() { emulation::sync_warp(); }

inline void wait_for_earlier_kernels() { emulation::wait_for_earlier_kernels(); }
inline void let_later_kernels_start() { emulation::let_later_kernels_start(); }
inline void fence_device() { emulation::fence_device(); }
template <class V>
void publish(V* to, V value) {
  uint32_t word;
  static_assert(sizeof(V) == sizeof(word));
  std::memcpy(&word, &value, 4);
  emulation::publish(to, word);
}
inline void add_published(int* to, int value) { emulation::add_published(to, value); }
template <class V>
V read_published(const V* from) {
  const uint32_t word = emulation::read_published(from);
  V value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline void publish_quad(float* to, const float (&values)[4]) {
  emulation::check_quad(to);
  for (int i = 0; i < 4; ++i) publish(to + i, values[i]);
}
inline void read_published_quad(float (&to)[4], const float* from) {
  emulation::check_quad(from);
  for (int i = 0; i < 4; ++i) to[i] = read_published(from + i);
}
inline void load_quad(float (&to)[4], const float* from) {
  emulation::check_quad(from);
  std::memcpy(to, from, sizeof(to));
}
inline void store_score(float* to, float value) { *to = value; }
inline void store_scores(float* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) emulation::fail("a pair is not aligned");
  to[0] = first, to[1] = second;
}

template <class V>
V shuffle(V value, int lane) {
  if (lane < 0 || lane > 31) emulation::fail("shuffle from lane %d", lane);
  const char* slots = emulation::exchange(&value, sizeof(V), "shuffle");
  return emulation::from_lane<V>(slots, lane);
}
template <class V>
V shuffle_xor(V value, int mask) {
  const char* slots = emulation::exchange(&value, sizeof(V), "shuffle_xor");
  return emulation::from_lane<V>(slots, emulation::thread_index() % 32 ^ mask);
}
inline unsigned ballot(bool yes) {
  const char* slots = emulation::exchange(&yes, sizeof(yes), "ballot");
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= unsigned{emulation::from_lane<bool>(slots, lane)} << lane;
  }
  return bits;
}
inline int bit_count(unsigned bits) { return __builtin_popcount(bits); }
inline int lowest_bit(unsigned bits) { return __builtin_ctz(bits); }
inline void atomic_add_shared(int* address, int value) { *address += value; }
inline void atomic_or_shared(unsigned* address, unsigned bits) { *address |= bits; }
inline unsigned atomic_inc_wrapping(unsigned* counter, unsigned most) {
  return emulation::atomic_inc_wrapping(counter, most);
}

inline unsigned float_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float larger_of(float a, float b) { return std::fmax(a, b); }
inline float exp2_of(float value) { return std::exp2(value); }
inline float log2_of(float value) { return std::log2(value); }

template <class T>
uint32_t pack(T, float low, float high) {
  return emulation::from_float(T{}, low) |
         static_cast<uint32_t>(emulation::from_float(T{}, high)) << 16;
}
inline float float_of(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t times_256(uint32_t pair) {
  return pack(fp16{}, emulation::half_to_float(static_cast<uint16_t>(pair)) * 256.f,
              emulation::half_to_float(static_cast<uint16_t>(pair >> 16)) * 256.f);
}
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t digits) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (digits >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
// OCP 8-bit floating point: a sign, four bits of exponent with a bias of 7, three of
// mantissa; no infinity, and NaN where all bits below the sign are set.
inline float e4m3_to_float(uint32_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  float value = exponent ? std::ldexp(1.f + mantissa / 8.f, exponent - 7)
                         : std::ldexp(mantissa / 8.f, -6);
  if ((byte & 0x7f) == 0x7f) value = std::nanf("");
  return byte & 0x80 ? -value : value;
}
inline uint32_t convert_e4m3_pair(uint32_t bytes) {
  return pack(fp16{}, e4m3_to_float(bytes & 0xff), e4m3_to_float(bytes >> 8 & 0xff));
}

inline void ldmatrix_x4(uint32_t (&to)[4], const char* row) {
  emulation::load_matrices(to, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const char* row) {
  emulation::load_matrices(to, row, true);
}
template <class T>
void mma(T, float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply<T>(to, a, b0, b1);
}
inline const char* opaque(const char* pointer) { return pointer; }
template <int kPrefetchBytes>
void copy_async_16(char* to, const char* from, bool valid) {
  emulation::copy_async(to, from, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

}  // namespace tidal
