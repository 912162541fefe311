// select_blocks: chooses the forced blocks and the heaviest others of each row and set.
// Defined by tidal_vllm/kernels/reference. Has run under the CPU emulation only, not yet
// on a GPU.
//
// One kernel. Its thread blocks sum the masses of a set's heads, a tile of selection
// blocks each (sum_masses.cuh). The last of a row and set to arrive chooses: it finds the
// smallest mass that is kept, digit by digit (an exact radix select), marks in bit masks
// what is kept, and writes the set in ascending order.
#pragma once

#include "arrivals.cuh"
#include "sum_masses.cuh"

namespace tidal {

inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kMassDepth = 4;  // loads of four masses that a thread has under way
inline constexpr int kChunk = 4 * kMassDepth * kSelectThreads;  // masses of one such round
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kWords = kChunk / 32;  // bit masks of a chunk, one for a thread
static_assert(kWords <= kSelectThreads);

struct ChooseShared {
  int bins[kBins];
  unsigned kept[kWords];  // a bit per mass of a chunk: it is kept
  unsigned ties[kWords];  // it is kept if there is room
  int warp_totals[kSelectWarps];
  int digit;
  int in_bin;
  int room;
};

inline constexpr int kSelectSharedBytes =
    larger(sizeof(ChooseShared), kSumSharedBytes);

// How much a set keeps of a row; all fields count selection blocks.
struct Kept {
  int total;   // of the row's sequence
  int blocks;  // kept
  int sinks;   // blocks before this one are forced
  int recent;  // this block and all after it are forced

  // How many of the blocks that are not forced are kept; 0 where masses do not matter.
  TIDAL_DEVICE int room() const {
    if (blocks == total || recent <= sinks) return 0;
    return larger(blocks - sinks - (total - recent), 0);
  }
};

TIDAL_DEVICE Kept kept_of(const SelectParams& p, int seq_len) {
  const int size = p.select_block_size;
  const int total = ceil_div(seq_len, size);
  if (seq_len <= p.keep_all_len) return {total, total, total, total};
  const int recent = larger(seq_len - larger(p.recent_tokens, 1), 0) / size;
  return {total, p.token_budget / size, ceil_div(p.sink_tokens, size), recent};
}

// Calls visit(i, masses) for masses i to i + 3 of a row and set, for the multiples i of 4
// from `begin` to `end`; `begin` is one. All lanes of a warp call it together, also for i
// beyond `end`, up to the next kChunk. There the masses are any numbers.
template <class Visit>
TIDAL_DEVICE void for_masses(const SelectParams& p, const float* mass, int begin, int end,
                             Visit&& visit) {
  const bool in_quads = p.mass_in_quads && ceil_div(end, 4) * 4 <= p.num_blocks;
#pragma unroll 1
  for (int base = begin; base < end; base += kChunk) {
    float found[kMassDepth][4] = {};
    const int first = base + 4 * thread_index();
    const float* from = mass + first;
    if (in_quads) {
#pragma unroll
      for (int j = 0; j < kMassDepth; ++j) {
        const int offset = 4 * j * kSelectThreads;
        if (first < end - offset) read_published_quad(found[j], from + offset);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4 * kMassDepth; ++j) {
        const int offset = 4 * (j / 4) * kSelectThreads + j % 4;
        if (first < end - offset) found[j / 4][j % 4] = read_published(from + offset);
      }
    }
#pragma unroll
    for (int j = 0; j < kMassDepth; ++j) {
      visit(first + 4 * j * kSelectThreads, found[j]);
    }
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
// shared->digit, in shared->in_bin how many keys have it, and in shared->room how many of
// those are to be kept.
TIDAL_DEVICE void find_digit(ChooseShared* shared, int room) {
  constexpr int kEach = kBins / kSelectThreads;
  const int top = kBins - 1 - thread_index() * kEach;  // thread 0 has the largest digits
  int count = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += shared->bins[top - i];
  int before = sum_before(count, shared->warp_totals);
  if (before >= room || before + count < room) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int here = shared->bins[top - i];
    if (before < room && before + here >= room) {
      shared->digit = top - i;
      shared->in_bin = here;
      shared->room = room - before;
    }
    before += here;
  }
}

// Masses as keys, the bits of floats: those that are not negative are ordered alike.
struct Threshold {
  unsigned least;  // keys from here on are kept
  int ties;        // how many masses of the key before it are kept, in ascending order
};

// Finds the `room`-th largest of the masses from `begin` to `end`, exactly. Precondition:
// 0 < room <= end - begin.
TIDAL_DEVICE Threshold find_threshold(const SelectParams& p, ChooseShared* shared,
                                      const float* mass, int begin, int end, int room) {
  unsigned prefix = 0, known = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 10 : 0;
    const unsigned digits = pass == 0 ? kBins - 1 : kBins / 2 - 1;
    for (int bin = thread_index(); bin < kBins; bin += kSelectThreads) {
      shared->bins[bin] = 0;
    }
    sync_block();
    for_masses(p, mass, begin / 4 * 4, end, [&](int first, const float (&masses)[4]) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int i = first + d;
        const unsigned key = float_bits(masses[d]);
        if (i >= begin && i < end && (key & known) == prefix) {
          atomic_add_shared(&shared->bins[key >> shift & digits], 1);
        }
      }
    });
    sync_block();
    find_digit(shared, room);
    sync_block();
    prefix |= static_cast<unsigned>(shared->digit) << shift;
    known |= digits << shift;
    room = shared->room;
    if (shared->in_bin == room) return {prefix, 0};
  }
  return {prefix + 1, room};
}

// Puts together the four bits of each of eight lanes, the first lane's lowest.
TIDAL_DEVICE unsigned word_of(unsigned bits) {
  bits <<= thread_index() % 8 * 4;
  bits |= shuffle_xor(bits, 1);
  bits |= shuffle_xor(bits, 2);
  return bits | shuffle_xor(bits, 4);
}

// Writes to `chosen` the blocks from `begin` to `end`, ascending, whose masses are kept.
TIDAL_DEVICE void write_heaviest(const SelectParams& p, ChooseShared* shared,
                                 const float* mass, int begin, int end,
                                 Threshold threshold, int* chosen) {
  int kept = 0, ties = 0;  // in the chunks before
#pragma unroll 1
  for (int chunk = begin / kChunk * kChunk; chunk < end; chunk += kChunk) {
    const int chunk_end = smaller(chunk + kChunk, end);
    for_masses(p, mass, chunk, chunk_end, [&](int first, const float (&masses)[4]) {
      unsigned is_kept = 0, is_tie = 0;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const unsigned key = float_bits(masses[d]);
        const bool counts = first + d >= begin && first + d < chunk_end;
        is_kept |= unsigned{counts && key >= threshold.least} << d;
        is_tie |= unsigned{counts && key == threshold.least - 1} << d;
      }
      is_kept = word_of(is_kept);
      is_tie = word_of(is_tie);
      if (thread_index() % 8 == 0) {
        shared->kept[(first - chunk) / 32] = is_kept;
        shared->ties[(first - chunk) / 32] = is_tie;
      }
    });
    sync_block();
    const bool has_word = thread_index() < kWords;
    const unsigned is_kept = has_word ? shared->kept[thread_index()] : 0;
    const unsigned is_tie =
        has_word && threshold.ties > 0 ? shared->ties[thread_index()] : 0;
    const int counts = bit_count(is_kept) + (bit_count(is_tie) << 16);
    const int before = sum_before(counts, shared->warp_totals);
    int ties_before = ties + (before >> 16);
    int rank = kept + (before & 0xffff) + smaller(ties_before, threshold.ties);
    for (unsigned left = is_kept | is_tie; left != 0; left &= left - 1) {
      const int bit = lowest_bit(left);
      if (is_tie >> bit & 1 && ties_before++ >= threshold.ties) continue;
      chosen[rank++] = chunk + 32 * thread_index() + bit;
    }
    for (int warp = 0; warp < kSelectWarps; ++warp) {
      kept += shared->warp_totals[warp] & 0xffff;
      ties += shared->warp_totals[warp] >> 16;
    }
  }
}

// Writes topk_lens, and of `chosen`, the set's line of topk_blocks, all but the blocks
// that masses choose.
TIDAL_DEVICE void write_forced(const SelectParams& p, int row, int set, const Kept& kept,
                               int* chosen) {
  const int blocks = smaller(kept.blocks, p.max_blocks), thread = thread_index();
  if (thread == 0) p.topk_lens[row * p.topk_lens_row_stride + set] = blocks;
  for (int i = blocks + thread; i < p.max_blocks; i += kSelectThreads) chosen[i] = -1;
  const int sinks = smaller(kept.sinks, blocks);
  for (int i = thread; i < sinks; i += kSelectThreads) chosen[i] = i;
  const int newest = kept.total - kept.recent;
  for (int i = thread; i < newest; i += kSelectThreads) {
    chosen[blocks - newest + i] = kept.recent + i;
  }
}

// Grid: (tiles of selection blocks, sets, rows).
TIDAL_KERNEL(kSelectThreads, 2) select_blocks_kernel(const SelectParams p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int set = block_y(), row = block_z();
  const int seq_len = p.seq_lens[row];
  if (seq_len < 0) return;
  const Kept kept = kept_of(p, seq_len);
  const int room = kept.room();
  int* chosen = p.topk_blocks + row * p.topk_row_stride + set * p.topk_set_stride;
  if (room == 0) {
    if (block_x() == 0) write_forced(p, row, set, kept, chosen);
    return;
  }
  const int blocks = smaller(kept.total, p.num_blocks);
  const int tiles = ceil_div(blocks, tile_of(p).blocks());
  if (block_x() >= tiles) return;
  float* mass = p.mass + row * p.mass_row_stride + set * p.mass_set_stride;
  sum_masses(p, row, set, blocks, mass);
  unsigned* counter = p.arrivals + static_cast<int64_t>(row) * p.num_heads + set;
  if (!arrives_last(counter, tiles)) return;
  ChooseShared* shared = reinterpret_cast<ChooseShared*>(shared_memory());
  write_forced(p, row, set, kept, chosen);
  const Threshold threshold =
      find_threshold(p, shared, mass, kept.sinks, kept.recent, room);
  write_heaviest(p, shared, mass, kept.sinks, kept.recent, threshold,
                 chosen + kept.sinks);
}

}  // namespace tidal
