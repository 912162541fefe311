// The second part of select_blocks: finds the heaviest masses of a row and set, exactly.
// held_masses.cuh goes on where they are few; the rest of this file where they are many.
//
// A radix select. The first digit of the smallest mass that is kept follows from the
// counts that sum_masses left. Then one pass over the masses marks, in bit masks, those
// above that digit and those that have it. The latter are few: each thread takes some of
// them into registers, where the other digits are found. A row that is too long for the
// masks, or with too many masses of that digit, is read again for each digit.
#pragma once

#include "sum_masses.cuh"

namespace tidal {

inline constexpr int kSelectWarps = kSelectThreads / 32;
// Loads of four masses that a thread has under way, to mark them and to count digits.
inline constexpr int kMarkDepth = 8;
inline constexpr int kCountDepth = 4;
inline constexpr int kMostMarked = 1 << 16;  // masses that have bits in the masks
inline constexpr int kListDepth = 8;         // masses of the list that a thread takes
inline constexpr int kMostListed = kListDepth * kSelectThreads;
inline constexpr int kMostHeld = 1 << 14;  // masses that shared memory holds at once
inline constexpr int kMostRanked = 256;    // masses that are compared with one another
static_assert(kMostMarked % (4 * kMarkDepth * kSelectThreads) == 0);

struct ChooseShared : SelectShared {
  union {
    struct {  // of held_masses.cuh
      Quad held[kMostHeld / 4];
      unsigned ranked[kMostRanked];  // the masses that are listed, in an order of their own
      int heavier[kMostRanked];      // how many others of the list are heavier
    };
    struct {
      int bins[kBins];
      unsigned kept[kMostMarked / 32];  // a bit per mass: it is kept
      unsigned open[kMostMarked / 32];  // it is kept if there is room
      int listed[kMostListed];          // places of masses with the first digit
    };
  };
  int warp_totals[kSelectWarps];
  int digit;
  int in_bin;
  int room;
};

inline constexpr int kSelectSharedBytes = larger(sizeof(ChooseShared), sizeof(SumShared));

// The masses of a row and set that are chosen from. Places count from `base`, a multiple
// of 32 that is at most 31 before `begin`.
struct Masses {
  const float* mass;
  int base, begin, end;
  bool in_quads;  // four at a time can be loaded, the last of them too

  TIDAL_DEVICE Masses(const SelectParams& p, const float* mass, int begin, int end)
      : mass(mass),
        base(begin / 32 * 32),
        begin(begin),
        end(end),
        in_quads(p.mass_in_quads && ceil_div(end, 4) * 4 <= p.num_blocks) {}
};

// Calls visit(i, masses) for masses i to i + 3, for the multiples i of 4 from `first` to
// `end`; `first` is one. A thread has kDepth loads under way. All threads call it equally
// often, so for some i beyond `end` too, up to the next multiple of 4 * kDepth *
// kSelectThreads after `first`. There the masses are any numbers.
template <int kDepth, class Visit>
TIDAL_DEVICE void for_masses(const Masses& m, int first, int end, Visit&& visit) {
  constexpr int kStep = 4 * kSelectThreads;
  if (!m.in_quads) {
#pragma unroll 1
    for (; first < end; first += kStep) {
      const int at = first + 4 * thread_index();
      float found[4] = {};
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        if (at + d < end) found[d] = read_published(m.mass + at + d);
      }
      visit(at, found);
    }
    return;
  }
#pragma unroll 1
  for (; first < end; first += kDepth * kStep) {
    const int at = first + 4 * thread_index();
    float found[kDepth][4] = {};
    const char* here = opaque(reinterpret_cast<const char*>(m.mass + at));
    const float* from = reinterpret_cast<const float*>(here);
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      if (at + j * kStep < end) read_published_quad(found[j], from + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kDepth; ++j) visit(at + j * kStep, found[j]);
  }
}

struct Sum {
  int before;  // of the values of all threads before this one, in thread order
  int total;   // of all threads
};

// Precondition: there was a barrier since warp_totals was last read.
TIDAL_DEVICE Sum sum_in_order(int value, int* warp_totals) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle(sum, lane >= step ? lane - step : lane);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  sync_block();
  Sum result{sum - value, 0};
#pragma unroll
  for (int i = 0; i < kSelectWarps; ++i) {
    if (i == warp) result.before += result.total;
    result.total += warp_totals[i];
  }
  return result;
}

inline constexpr int kBinsEach = kBins / kSelectThreads;

// The largest digit that a thread looks at; it also takes the kBinsEach - 1 below it.
TIDAL_DEVICE int top_digit() { return kBins - 1 - thread_index() * kBinsEach; }

// Finds the digit of the `room`-th largest of the keys, of which counts[i] have the digit
// top_digit() - i. Leaves it in shared->digit, in shared->in_bin how many keys have it, and
// in shared->room how many of those are to be kept. Ends with a barrier.
TIDAL_DEVICE void find_digit(ChooseShared* shared, const int (&counts)[kBinsEach],
                             int room) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) count += counts[i];
  int before = sum_in_order(count, shared->warp_totals).before;
  if (before < room && before + count >= room) {
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      if (before < room && before + counts[i] >= room) {
        shared->digit = top_digit() - i;
        shared->in_bin = counts[i];
        shared->room = room - before;
      }
      before += counts[i];
    }
  }
  sync_block();
}

// The same, from the bins. Begins with a barrier.
TIDAL_DEVICE void find_digit_in_bins(ChooseShared* shared, int room) {
  sync_block();
  int counts[kBinsEach];
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) counts[i] = shared->bins[top_digit() - i];
  find_digit(shared, counts, room);
}

// Finds the first digit, from the counts of all thread blocks, and makes them 0 again.
// `meanwhile` is called while the counts are on their way.
template <class Meanwhile>
TIDAL_DEVICE void find_first_digit(ChooseShared* shared, int* digit_counts, int room,
                                   Meanwhile&& meanwhile) {
  int* from = digit_counts + top_digit();
  int counts[kBinsEach];
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) counts[i] = read_published(from - i);
  meanwhile();
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    if (counts[i] > 0) publish(from - i, 0);
  }
  find_digit(shared, counts, room);
}

struct Threshold {
  unsigned least;  // keys from here on are kept
  int ties;        // how many masses of the key before it are kept, in ascending order
};

// Finds the rest of the key after its first digit. for_keys(visit) calls visit(key) with
// every key of that digit, and perhaps with others.
template <class ForKeys>
TIDAL_DEVICE Threshold find_threshold(ChooseShared* shared, ForKeys&& for_keys) {
  unsigned prefix = static_cast<unsigned>(shared->digit) << kFirstShift;
  unsigned known = ~0u << kFirstShift;
  int room = shared->room;
#pragma unroll 1
  for (int shift = kFirstShift / 2; shift >= 0; shift -= kFirstShift / 2) {
    if (shared->in_bin == room) return {prefix, 0};
    constexpr unsigned kDigits = (1 << kFirstShift / 2) - 1;
    for (int bin = thread_index(); bin < kBins; bin += kSelectThreads) {
      shared->bins[bin] = 0;
    }
    sync_block();
    for_keys([&](unsigned key) {
      if ((key & known) == prefix) {
        atomic_add_shared(&shared->bins[key >> shift & kDigits], 1);
      }
    });
    find_digit_in_bins(shared, room);
    prefix |= static_cast<unsigned>(shared->digit) << shift;
    known |= kDigits << shift;
    room = shared->room;
  }
  if (shared->in_bin == room) return {prefix, 0};
  return {prefix + 1, room};
}

// Reads the masses again for each digit.
TIDAL_DEVICE Threshold threshold_of_all(const Masses& m, ChooseShared* shared) {
  return find_threshold(shared, [&](auto&& visit) {
    for_masses<kCountDepth>(m, m.base, m.end, [&](int first, const float (&masses)[4]) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        if (first + d >= m.begin && first + d < m.end) visit(float_bits(masses[d]));
      }
    });
  });
}

// Marks the masses from `first` to `end`, up to kMostMarked, as kept whose keys are
// `least` or more, and as open where they are less and at least `low`. The first bit is
// that of `first`, a multiple of 32. Marks before m.begin and beyond `end` mean nothing:
// valid_bits. kDepth: for_masses.
template <int kDepth = kMarkDepth>
TIDAL_DEVICE void mark(const Masses& m, ChooseShared* shared, int first, int end,
                       unsigned low, unsigned least) {
  for_masses<kDepth>(m, first, end, [&](int at, const float (&masses)[4]) {
    unsigned below = 0, out = 0;  // a bit per mass: less than `least`; than `low`
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const unsigned key = float_bits(masses[d]);
      below |= (key - least) >> (31 - d) & 1u << d;
      out |= (key - low) >> (31 - d) & 1u << d;
    }
    // The bits of four lanes make 16 of each kind, those of eight lanes a word.
    unsigned bits = (~below & 15) | (~out & 15) << 16;
    bits <<= thread_index() % 4 * 4;
    bits |= shuffle_xor(bits, 1);
    bits |= shuffle_xor(bits, 2);
    const unsigned next = shuffle_xor(bits, 4);
    if (thread_index() % 8 == 0) {
      const unsigned kept = (bits & 0xffff) | next << 16;
      shared->kept[(at - first) / 32] = kept;
      shared->open[(at - first) / 32] = (bits >> 16 | (next & 0xffff0000)) & ~kept;
    }
  });
}

// The bits that mean something of the word of 32 masses from number `at` on, some of which
// are between m.begin and m.end.
TIDAL_DEVICE unsigned valid_bits(const Masses& m, int at) {
  return ~0u << larger(m.begin - at, 0) & ~0u >> larger(at + 32 - m.end, 0);
}

// Lists the places of all masses that are marked as open, and takes their marks away.
// Precondition: a barrier since they were marked. Ends with one.
TIDAL_DEVICE void list_open(const Masses& m, ChooseShared* shared) {
  const int words = ceil_div(m.end - m.base, 32);
  int listed = 0;
#pragma unroll 1
  for (int first = 0; first < words; first += kSelectThreads) {
    const int word = first + thread_index();
    unsigned left = 0;
    if (word < words) {
      left = shared->open[word] & valid_bits(m, m.base + 32 * word);
      shared->open[word] = 0;
    }
    const Sum sum = sum_in_order(bit_count(left), shared->warp_totals);
    int at = listed + sum.before;
    for (; left != 0; left &= left - 1) {
      shared->listed[at++] = 32 * word + lowest_bit(left);
    }
    listed += sum.total;
    sync_block();
  }
}

// Chooses from the list, and marks what is kept of it, and as open what is tied for the
// last places. Returns how many of the tied are kept.
TIDAL_DEVICE int mark_listed(const Masses& m, ChooseShared* shared) {
  const int left = shared->in_bin - thread_index();  // of the list, from its first on
  const int in_list = (left + kSelectThreads - 1) / kSelectThreads;
  unsigned keys[kListDepth];
#pragma unroll
  for (int i = 0; i < kListDepth; ++i) {
    keys[i] = 0;
    if (i < in_list) {
      const int place = shared->listed[i * kSelectThreads + thread_index()];
      keys[i] = float_bits(read_published(m.mass + m.base + place));
    }
  }
  const Threshold threshold = find_threshold(shared, [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < kListDepth; ++i) {
      if (i < in_list) visit(keys[i]);
    }
  });
#pragma unroll
  for (int i = 0; i < kListDepth; ++i) {
    const bool is_kept = keys[i] >= threshold.least;
    const bool is_tie = threshold.ties > 0 && keys[i] == threshold.least - 1;
    if (i >= in_list || !(is_kept || is_tie)) continue;
    const int place = shared->listed[i * kSelectThreads + thread_index()];
    atomic_or_shared((is_kept ? shared->kept : shared->open) + place / 32,
                     1u << place % 32);
  }
  return threshold.ties;
}

}  // namespace tidal
