// Kernels that break a rule, and mma and ldmatrix against plain loops. Prints what the
// emulation says of the kernel that the command line names.
#include <iostream>
#include <map>
#include <vector>

#include "cache_units.h"
#include "divisor.h"
#include "fp8.cuh"

using namespace tidal;

namespace {

void copy_16(bool wait, bool barrier, int misalign) {
  alignas(16) static const char source[32] = {};
  char* to = shared_memory() + 16 * thread_index();
  copy_async_16<128>(to, source + misalign, true);
  commit_copies();
  if (wait) wait_copies<0>();
  if (barrier) sync_warp();
  uint32_t matrices[4];
  ldmatrix_x4(matrices, to);
}

void multiply() {
  const int lane = thread_index();
  const auto a_at = [](int row, int k) { return float((row * 7 + k * 3) % 11 - 5); };
  const auto b_at = [](int k, int col) { return float((k * 5 + col * 2) % 13 - 6); };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r % 2), k = 2 * (lane % 4) + 8 * (r / 2);
    a[r] = pack(bf16{}, a_at(row, k), a_at(row, k + 1));
  }
  for (int r = 0; r < 2; ++r) {
    const int k = 2 * (lane % 4) + 8 * r, column = lane / 4;
    b[r] = pack(bf16{}, b_at(k, column), b_at(k + 1, column));
  }
  float c[4] = {100.f, 100.f, 100.f, 100.f};
  mma(bf16{}, c, a, b[0], b[1]);
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
    float sum = 100.f;
    for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, column);
    if (sum != c[r]) emulation::fail("mma[%d, %d] is %f, not %f", row, column, c[r], sum);
  }
}

void transpose() {
  const int lane = thread_index();
  uint16_t* memory = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane; i < 4 * 64; i += 32) memory[i] = static_cast<uint16_t>(i);
  sync_warp();
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(plain, shared_memory() + lane * 16);
  ldmatrix_x4_trans(transposed, shared_memory() + lane * 16);
  for (int m = 0; m < 4; ++m) {
    const int row = lane / 4, column = lane % 4 * 2;
    if ((plain[m] & 0xffff) != unsigned(m * 64 + row * 8 + column) ||
        (transposed[m] >> 16) != unsigned(m * 64 + (column + 1) * 8 + row)) {
      emulation::fail("ldmatrix: wrong element in matrix %d", m);
    }
  }
}

// sm_80 widens by shifts what later GPUs convert by an instruction.
void widen() {
  if (thread_index() > 0) return;
  for (uint32_t bytes = 0; bytes < 1 << 16; ++bytes) {
    const uint32_t shifted = widen_by_shifts(bytes), converted = convert_e4m3_pair(bytes);
    for (int half = 0; half < 32; half += 16) {
      const float a = emulation::half_to_float(static_cast<uint16_t>(shifted >> half));
      const float b = emulation::half_to_float(static_cast<uint16_t>(converted >> half));
      if (a != b && !(a != a && b != b)) emulation::fail("%x is %f, not %f", bytes, a, b);
    }
  }
}

// Around multiples of the divisor, at both ends of the numbers it takes.
void divide() {
  const int largest = 2147483647;
  for (int value : {1, 2, 3, 7, 16, 48, 544, 65535, 65537, 1 << 30, largest - 1, largest}) {
    const Divisor by(value);
    for (int64_t multiple : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1000},
                             int64_t{largest / value - 1}, int64_t{largest / value}}) {
      for (int64_t n = multiple * value - 1; n <= multiple * value + 1; ++n) {
        if (n < 0 || n > largest) continue;
        const int got = by.quotient(static_cast<int>(n));
        if (got != n / value) emulation::fail("%d / %d is %d", int(n), value, got);
      }
    }
  }
}

// Blocks are 2049 tokens apart. One block more than 32 bits can count is refused.
void count_units() {
  TensorView cache;
  cache.rank = 4;
  const int64_t blocks = (int64_t{1} << 32) / 2049;
  const int64_t sizes[] = {blocks, 1, 2048, 256}, strides[] = {2049 * 256, 256, 256, 1};
  for (int dim = 0; dim < 4; ++dim) {
    cache.sizes[dim] = sizes[dim];
    cache.strides[dim] = strides[dim];
  }
  const Checks checks("op", "cpu");
  const CacheUnits units(cache, 2);
  if (units.bytes != 512 || units.block != 2049 || units.token != 1) {
    emulation::fail("units of %d bytes", int(units.bytes));
  }
  units.check(checks, cache);
  ++cache.sizes[0];
  units.check(checks, cache);
}

float published[128];

// Each thread of two thread blocks of two warps publishes a 1; the last of the two blocks
// adds them up.
void add_up(bool fence, bool barrier, bool past_l1) {
  static unsigned counter = 0;
  const int thread = thread_index();
  publish(&published[block_x() * 64 + thread], 1.f);
  if (fence) fence_device();
  if (barrier) sync_block();
  const bool last = any_in_block(thread == 0 && atomic_inc_wrapping(&counter, 1) == 1);
  if (!last || thread > 0) return;
  float sum = 0.f;
  for (float& number : published) sum += past_l1 ? read_published(&number) : number;
  if (sum != 128.f) emulation::fail("%d of 128 are seen", static_cast<int>(sum));
}

int* const earlier = new int[4]{};  // what an earlier kernel wrote

struct Test {
  void (*kernel)();
  int threads = 32, blocks = 1;
  bool waits = true;  // for earlier kernels, before it begins
};

const std::map<std::string, Test> tests = {
    {"copy, wait, barrier, read", {[] { copy_16(true, true, 0); }}},
    {"read without a barrier", {[] { copy_16(true, false, 0); }}},
    {"end without a wait", {[] { copy_16(false, true, 0); }}},
    {"copy from an odd address", {[] { copy_16(true, true, 8); }}},
    {"ballot that some lanes skip",
     {[] {
       if (thread_index() % 2) ballot(true);
     }}},
    {"two instructions at once",
     {[] { thread_index() < 16 ? (void)ballot(true) : sync_warp(); }}},
    {"barrier that a warp skips",
     {[] {
        if (thread_index() < 32) sync_block();
      },
      64}},
    {"shared memory past its end", {[] { shared_memory()[2048] = 1; }}},
    {"publish, fence, barrier, count", {[] { add_up(true, true, true); }, 64, 2}},
    {"publish without a fence", {[] { add_up(false, true, true); }, 64, 2}},
    {"count before all threads have fenced", {[] { add_up(true, false, true); }, 64, 2}},
    {"published numbers by an ordinary load", {[] { add_up(true, true, false); }, 64, 2}},
    {"read before the wait for earlier kernels",
     {[] {
        if (earlier[0] == 0) wait_for_earlier_kernels();
      },
      32, 1, false}},
    {"never wait for earlier kernels", {[] {}, 32, 1, false}},
    {"let later kernels start first", {[] { let_later_kernels_start(); }, 32, 1, false}},
    {"mma", {multiply}},
    {"ldmatrix", {transpose}},
    {"e4m3 by shifts", {widen}},
    {"division", {divide}},
};

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulation::guard(earlier, 4 * sizeof(int));
  try {
    if (name == "a cache of too many units") count_units();
    const Test& test = tests.at(name);
    for (unsigned schedule = 0; schedule < 40; ++schedule) {
      emulation::set_schedule(schedule);
      for (float& number : published) number = 0.f;
      emulation::launch({test.blocks}, test.threads, 2048, [&] {
        if (test.waits) wait_for_earlier_kernels();
        test.kernel();
      });
    }
    std::cout << "ok";
  } catch (const std::exception& error) {
    std::cout << error.what();
  }
}
