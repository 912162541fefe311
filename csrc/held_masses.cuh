// The usual end of select_blocks: a row of up to kMostHeld masses, few of which have the
// first digit of the smallest one that is kept.
//
// The masses are copied to shared memory while the counts of first digits are read. Then
// each thread takes some neighbours and compares them with that digit. Those that have it
// are listed, in ascending order of their places, and each is compared with all others.
#pragma once

#include "find_heaviest.cuh"

namespace tidal {

// Masses on their way: a thread's share of a row.
struct Loaded {
  static constexpr int kStep = 4 * kSelectThreads;
  Quad found[kMostHeld / kStep];

  TIDAL_DEVICE void start(const Masses& m) {
    const int at = 4 * thread_index(), count = m.end - m.base;
    const float* from = m.mass + m.base + at;
#pragma unroll
    for (int i = 0; i < kMostHeld / kStep; ++i) {
      if (at + i * kStep >= count) continue;
      if (m.in_quads) {
        read_published_quad(found[i].of, from + i * kStep);
      } else {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const bool exists = at + i * kStep + d < count;
          found[i].of[d] = exists ? read_published(from + i * kStep + d) : 0.f;
        }
      }
    }
  }

  // Leaves them in shared->held, from m.base on, for who reads after the next barrier.
  TIDAL_DEVICE void hold(const Masses& m, ChooseShared* shared) const {
    const int at = 4 * thread_index(), count = m.end - m.base;
#pragma unroll
    for (int i = 0; i < kMostHeld / kStep; ++i) {
      if (at + i * kStep < count) {
        shared->held[thread_index() + i * kSelectThreads] = found[i];
      }
    }
  }
};

// A thread's neighbours among the masses: a bit each, up to 32.
struct Neighbours {
  int first;      // place of the first
  unsigned kept;  // their first digit is larger than that of the smallest that is kept
  unsigned open;  // the same
};

// Compares this thread's masses with the first digit that was found.
TIDAL_DEVICE Neighbours compare_held(const Masses& m, const ChooseShared* shared) {
  const int count = m.end - m.base;
  int bits = 0;  // a thread takes 4 << bits masses
  while (4 * kSelectThreads << bits < count) ++bits;
  const int quads = 1 << bits, first = thread_index() << bits;
  const unsigned low = static_cast<unsigned>(shared->digit) << kFirstShift;
  const unsigned high = low + (1u << kFirstShift);
  Neighbours found{4 * first, 0, 0};
#pragma unroll 1
  for (int i = 0; i < quads; ++i) {
    const int quad = (i + thread_index()) & (quads - 1);  // so that no banks conflict
    if (4 * (first + quad) >= count) continue;
    const Quad masses = shared->held[first + quad];
    unsigned below = 0, out = 0;
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const unsigned key = float_bits(masses.of[d]);
      below |= (key - high) >> (31 - d) & 1u << d;
      out |= (key - low) >> (31 - d) & 1u << d;
    }
    found.kept |= (~below & 15) << 4 * quad;
    found.open |= (below & ~out & 15) << 4 * quad;
  }
  const int before = larger(m.begin - m.base - found.first, 0);
  const int beyond = larger(found.first + 32 - count, 0);
  const unsigned valid =
      before < 32 && beyond < 32 ? ~0u << before & ~0u >> beyond : 0;
  found.kept &= valid;
  found.open &= valid;
  return found;
}

// Writes to `chosen` the heaviest masses, ascending. Preconditions: the masses are held,
// the first digit was found, and up to kMostRanked masses have it.
TIDAL_DEVICE void write_held(const Masses& m, ChooseShared* shared, int* chosen) {
  static_assert(kMostRanked <= kSelectThreads && kMostRanked <= 256);
  Neighbours mine = compare_held(m, shared);
  if (thread_index() < kMostRanked) shared->heavier[thread_index()] = 0;
  const int* held = reinterpret_cast<const int*>(shared->held);
  const int listed = sum_in_order(bit_count(mine.open), shared->warp_totals).before;
  int at = listed;
  for (unsigned left = mine.open; left != 0; left &= left - 1, ++at) {
    // What the digits after the first say; of equal masses the earlier one is heavier.
    const unsigned rest = held[mine.first + lowest_bit(left)] & ((1u << kFirstShift) - 1);
    shared->ranked[at] = rest << 8 | (255 - at);
  }
  sync_block();
  // `width` threads take one of the listed each, and others share the work.
  const int count = shared->in_bin;
  int width_bits = 5;
  while (1 << width_bits < count) ++width_bits;
  const int nth = thread_index() & ((1 << width_bits) - 1);
  const int sharers = kSelectThreads >> width_bits;
  if (nth < count) {
    const unsigned own = shared->ranked[nth];
    int heavier = 0;
#pragma unroll 4
    for (int i = thread_index() >> width_bits; i < count; i += sharers) {
      heavier += shared->ranked[i] > own;
    }
    if (heavier > 0) atomic_add_shared(&shared->heavier[nth], heavier);
  }
  sync_block();
  at = listed;
  for (unsigned left = mine.open; left != 0; left &= left - 1, ++at) {
    if (shared->heavier[at] < shared->room) mine.kept |= 1u << lowest_bit(left);
  }
  int rank = sum_in_order(bit_count(mine.kept), shared->warp_totals).before;
  for (unsigned left = mine.kept; left != 0; left &= left - 1) {
    chosen[rank++] = m.base + mine.first + lowest_bit(left);
  }
}

}  // namespace tidal
