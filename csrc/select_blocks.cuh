// select_blocks: chooses the forced blocks and the heaviest others of each row and set.
// Defined by tidal_vllm/kernels/reference. Has run under the CPU emulation only, not yet
// on a GPU.
//
// Two kernels. `sum_masses` adds up the masses of a set's heads. `choose_blocks`, one
// thread block per row and set, finds the smallest mass that is kept, digit by digit (an
// exact radix select), and writes the set in ascending order.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace tidal {

inline constexpr int kMassThreads = 128;
inline constexpr int kChooseThreads = 1024;
inline constexpr int kChooseWarps = kChooseThreads / 32;
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;

struct ChooseShared {
  int bins[kBins];
  int warp_totals[2][kChooseWarps];
  int digit;
  int room;
};

// How much a set keeps of a row; all fields count selection blocks.
struct Kept {
  int total;   // of the row's sequence
  int blocks;  // kept
  int sinks;   // blocks before this one are forced
  int recent;  // this block and all after it are forced
};

TIDAL_DEVICE Kept kept_of(const SelectParams& p, int seq_len) {
  const int size = p.select_block_size;
  const int total = ceil_div(seq_len, size);
  if (seq_len <= p.keep_all_len) return {total, total, total, total};
  const int recent = larger(seq_len - larger(p.recent_tokens, 1), 0) / size;
  return {total, p.token_budget / size, ceil_div(p.sink_tokens, size), recent};
}

// Grid: (groups of kMassThreads selection blocks, sets, rows).
TIDAL_KERNEL(kMassThreads, 1) sum_masses(const SelectParams p) {
  const int row = block_z(), set = block_y();
  const Kept kept = kept_of(p, p.seq_lens[row]);
  const int block = block_x() * kMassThreads + thread_index();
  if (kept.blocks == kept.total || block >= smaller(kept.total, p.num_blocks)) return;
  const int heads = p.num_heads / p.num_sets;
  const int first = set * heads;
  const float* from =
      p.block_lse + row * p.block_lse_row_stride + first * p.block_lse_head_stride;
  const float* lse = p.lse + static_cast<int64_t>(row) * p.num_heads + first;
  float mass = 0.f;
#pragma unroll 8
  for (int head = 0; head < heads; ++head) {
    mass += exp2_of((from[head * p.block_lse_head_stride + block] - lse[head]) * kLog2E);
  }
  if (!(mass > 0.f)) mass = 0.f;  // a NaN weighs nothing
  p.mass[row * p.mass_row_stride + set * p.mass_set_stride + block] = mass;
}

// Adds one to the digit's bin for each lane where `counts` is true. Many masses are
// equal, zeros above all, so lanes of the same digit add together.
TIDAL_DEVICE void count_digit(int* bins, unsigned digit, bool counts) {
  const unsigned lanes = ballot(counts);
  if (lanes == 0) return;
  const int leader = lowest_bit(lanes);
  const unsigned first = shuffle(digit, leader);
  const bool agrees = counts && digit == first;
  if (ballot(agrees) == lanes) {
    if (thread_index() % 32 == leader) atomic_add_shared(&bins[digit], bit_count(lanes));
  } else if (counts) {
    atomic_add_shared(&bins[digit], 1);
  }
}

// The sum of the values of all threads before this one, in thread order. Precondition:
// there was a barrier since warp_totals was last read.
TIDAL_DEVICE int sum_before(int value, int* warp_totals) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle(sum, lane >= step ? lane - step : lane);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  sync_block();
  int before = 0;
  for (int i = 0; i < warp; ++i) before += warp_totals[i];
  return before + sum - value;
}

// Finds the digit of the `room`-th largest of the keys that the bins count. Leaves it in
// shared->digit, and in shared->room how many keys of that digit are to be kept.
TIDAL_DEVICE void find_digit(ChooseShared* shared, int room) {
  constexpr int kEach = kBins / kChooseThreads;
  const int top = kBins - 1 - thread_index() * kEach;  // thread 0 has the largest digits
  int count = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += shared->bins[top - i];
  int before = sum_before(count, shared->warp_totals[0]);
  if (before >= room || before + count < room) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int here = shared->bins[top - i];
    if (before < room && before + here >= room) {
      shared->digit = top - i;
      shared->room = room - before;
    }
    before += here;
  }
}

struct Threshold {
  unsigned key;  // the bits of the smallest mass that is kept
  int ties;      // how many masses equal to it are kept: those of the smallest indices
};

// Finds the `room`-th largest of `count` masses, exactly. Precondition: 0 < room <=
// count. The bits of floats that are not negative are ordered as the floats are.
TIDAL_DEVICE Threshold find_threshold(ChooseShared* shared, const float* mass, int count,
                                int room) {
  unsigned prefix = 0, known = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const unsigned digits = pass == 2 ? kBins / 2 - 1 : kBins - 1;
    for (int bin = thread_index(); bin < kBins; bin += kChooseThreads) {
      shared->bins[bin] = 0;
    }
    sync_block();
    for (int base = 0; base < count; base += kChooseThreads) {
      const int i = base + thread_index();
      const unsigned key = i < count ? float_bits(mass[i]) : 0;
      count_digit(shared->bins, (key >> shift) & digits,
                  i < count && (key & known) == prefix);
    }
    sync_block();
    find_digit(shared, room);
    sync_block();
    prefix |= static_cast<unsigned>(shared->digit) << shift;
    known |= digits << shift;
    room = shared->room;
    sync_block();
  }
  return {prefix, room};
}

// Writes to `chosen` the blocks first + i, ascending, for each mass i above the threshold
// and the first few that equal it. Each warp takes masses that are neighbours.
TIDAL_DEVICE void write_heaviest(ChooseShared* shared, const float* mass, int count,
                           Threshold threshold, int first, int* chosen) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int run = ceil_div(count, kChooseThreads) * 32;
  const int begin = smaller(warp * run, count), end = smaller(begin + run, count);
  int above = 0, ties = 0;
  for (int base = begin; base < end; base += 32) {
    const unsigned key = base + lane < end ? float_bits(mass[base + lane]) : 0;
    above += bit_count(ballot(base + lane < end && key > threshold.key));
    ties += bit_count(ballot(base + lane < end && key == threshold.key));
  }
  if (lane == 0) {
    shared->warp_totals[0][warp] = above;
    shared->warp_totals[1][warp] = ties;
  }
  sync_block();
  above = ties = 0;
  for (int i = 0; i < warp; ++i) {
    above += shared->warp_totals[0][i];
    ties += shared->warp_totals[1][i];
  }
  const unsigned lower = (1u << lane) - 1;
  for (int base = begin; base < end; base += 32) {
    const int i = base + lane;
    const unsigned key = i < end ? float_bits(mass[i]) : 0;
    const unsigned is_above = ballot(i < end && key > threshold.key);
    const unsigned is_tie = ballot(i < end && key == threshold.key);
    const int ties_before = ties + bit_count(is_tie & lower);
    const bool kept =
        (is_above >> lane & 1) || ((is_tie >> lane & 1) && ties_before < threshold.ties);
    if (kept) {
      const int rank =
          above + bit_count(is_above & lower) + smaller(ties_before, threshold.ties);
      chosen[rank] = first + i;
    }
    above += bit_count(is_above);
    ties += bit_count(is_tie);
  }
}

// Grid: (sets, rows).
TIDAL_KERNEL(kChooseThreads, 1) choose_blocks(const SelectParams p) {
  ChooseShared* shared = reinterpret_cast<ChooseShared*>(shared_memory());
  const int set = block_x(), row = block_y(), thread = thread_index();
  const int seq_len = p.seq_lens[row];
  if (seq_len < 0) return;
  const Kept kept = kept_of(p, seq_len);
  const int blocks = smaller(kept.blocks, p.max_blocks);
  int* chosen = p.topk_blocks + row * p.topk_row_stride + set * p.topk_set_stride;
  if (thread == 0) p.topk_lens[row * p.topk_lens_row_stride + set] = blocks;
  for (int i = blocks + thread; i < p.max_blocks; i += kChooseThreads) chosen[i] = -1;
  if (kept.blocks == kept.total) {
    for (int i = thread; i < blocks; i += kChooseThreads) chosen[i] = i;
    return;
  }
  const int newest = kept.total - kept.recent;
  for (int i = thread; i < kept.sinks; i += kChooseThreads) chosen[i] = i;
  for (int i = thread; i < newest; i += kChooseThreads) {
    chosen[blocks - newest + i] = kept.recent + i;
  }
  const int count = kept.recent - kept.sinks;
  const int room = blocks - kept.sinks - newest;
  if (room <= 0 || count <= 0) return;
  const float* mass =
      p.mass + row * p.mass_row_stride + set * p.mass_set_stride + kept.sinks;
  const Threshold threshold = find_threshold(shared, mass, count, room);
  write_heaviest(shared, mass, count, threshold, kept.sinks, chosen + kept.sinks);
}

}  // namespace tidal
