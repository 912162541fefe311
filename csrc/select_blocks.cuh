// select_blocks: chooses the forced blocks and the heaviest others of each row and set.
// Defined by tidal_vllm/kernels/reference.
//
// One kernel. Its thread blocks sum the masses of a set's heads, tile by tile, and count
// their first digits (sum_masses.cuh). The last of a row and set to arrive chooses, and
// writes the set in ascending order: held_masses.cuh, or find_heaviest.cuh where there are
// too many masses.
#pragma once

#include "arrivals.cuh"
#include "held_masses.cuh"

namespace tidal {

// How many blocks were found so far.
struct Found {
  int kept = 0;
  int open = 0;  // kept or not
};

// Writes to `chosen`, ascending, what is marked from `first` to `end`: all that is kept,
// and of all that is open the first `ties`. Precondition: a barrier since it was marked.
// Ends with one.
TIDAL_DEVICE Found write_marked(const Masses& m, ChooseShared* shared, int first, int end,
                                int ties, Found found, int* chosen) {
  const int words = ceil_div(end - first, 32);
#pragma unroll 1
  for (int round = 0; round < words; round += kSelectThreads) {
    const int word = round + thread_index();
    const unsigned valid = word < words ? valid_bits(m, first + 32 * word) : 0;
    const unsigned is_kept = valid != 0 ? shared->kept[word] & valid : 0;
    const unsigned is_open = valid != 0 && ties > 0 ? shared->open[word] & valid : 0;
    const int counts = bit_count(is_kept) + (bit_count(is_open) << 16);
    const Sum sum = sum_in_order(counts, shared->warp_totals);
    int open_before = found.open + (sum.before >> 16);
    int rank = found.kept + (sum.before & 0xffff) + smaller(open_before, ties);
    for (unsigned left = is_kept | is_open; left != 0; left &= left - 1) {
      const int bit = lowest_bit(left);
      if (is_open >> bit & 1 && open_before++ >= ties) continue;
      chosen[rank++] = first + 32 * word + bit;
    }
    found.kept += sum.total & 0xffff;
    found.open += sum.total >> 16;
    sync_block();
  }
  return found;
}
static_assert(32 * kSelectThreads <= 0x7fff, "16 bits hold the counts of a round");

// Writes to `chosen` the `room` heaviest blocks, ascending. `meanwhile` is called while the
// counts are on their way.
template <class Meanwhile>
TIDAL_DEVICE void write_heaviest(const Masses& m, ChooseShared* shared, int* digit_counts,
                                 int room, int* chosen, Meanwhile&& meanwhile) {
  const bool are_held = m.end - m.base <= kMostHeld;
  find_first_digit(shared, digit_counts, room, [&] {
    Loaded loaded;
    if (are_held) loaded.start(m);
    if (are_held) loaded.hold(m, shared);
    meanwhile();
  });
  if (are_held && shared->in_bin <= kMostRanked) {
    write_held(m, shared, chosen);
    return;
  }
  if (m.end - m.base <= kMostMarked && shared->in_bin <= kMostListed) {
    const unsigned low = static_cast<unsigned>(shared->digit) << kFirstShift;
    mark(m, shared, m.base, m.end, low, low + (1u << kFirstShift));
    sync_block();
    list_open(m, shared);
    const int ties = mark_listed(m, shared);
    sync_block();
    write_marked(m, shared, m.base, m.end, ties, {}, chosen);
    return;
  }
  const Threshold threshold = threshold_of_all(m, shared);
  Found found;
#pragma unroll 1
  for (int first = m.base; first < m.end; first += kMostMarked) {
    const int end = smaller(first + kMostMarked, m.end);
    mark<kCountDepth>(m, shared, first, end, threshold.least - 1, threshold.least);
    sync_block();
    found = write_marked(m, shared, first, end, threshold.ties, found, chosen);
  }
}

// Writes topk_lens, and of `chosen`, the set's line of topk_blocks, all but the blocks
// that masses choose.
TIDAL_DEVICE void write_forced(const SelectParams& p, int row, int set, const Kept& kept,
                               int* chosen) {
  const int blocks = smaller(kept.blocks, p.max_blocks), thread = thread_index();
  if (thread == 0) p.topk_lens[row * p.topk_lens_row_stride + set] = blocks;
#pragma unroll 1
  for (int i = blocks + thread; i < p.max_blocks; i += kSelectThreads) chosen[i] = -1;
  const int sinks = smaller(kept.sinks, blocks);
#pragma unroll 1
  for (int i = thread; i < sinks; i += kSelectThreads) chosen[i] = i;
  const int newest = kept.total - kept.recent;
#pragma unroll 1
  for (int i = thread; i < newest; i += kSelectThreads) {
    chosen[blocks - newest + i] = kept.recent + i;
  }
}

// What the last thread block of a row and set does.
TIDAL_DEVICE void choose(const SelectParams& p, int row, int set, const float* mass,
                         int* digit_counts, int* chosen) {
  ChooseShared* shared = reinterpret_cast<ChooseShared*>(shared_memory());
  const Kept kept = shared->rule;
  write_heaviest(Masses(p, mass, kept.sinks, kept.recent),
                 shared, digit_counts, kept.room(), chosen + kept.sinks,
                 [&] { write_forced(p, row, set, kept, chosen); });
}

// Grid: (thread blocks that share a row and set, sets, rows).
TIDAL_KERNEL(kSelectThreads, 2) select_blocks_kernel(const SelectParams p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const int set = block_y(), row = block_z();
  const int seq_len = p.seq_lens[row];
  if (seq_len < 0) return;
  const int heads = p.num_sets == 1 ? p.num_heads : p.num_heads / p.num_sets;
  const MassTile tile = tile_of(heads);
  if (block_x() > 0 && !begins_before(p, block_x() * tile.blocks(), seq_len)) return;
  const int64_t line = static_cast<int64_t>(row) * p.num_sets + set;
  int* digit_counts = p.digit_counts + line * kBins;
  float* mass = p.mass + row * p.mass_row_stride + set * p.mass_set_stride;
  const int sharers = sum_masses(p, tile, row, set, heads, seq_len, mass, digit_counts);
  int* chosen = p.topk_blocks + row * p.topk_row_stride + set * p.topk_set_stride;
  if (sharers == 0) {
    if (block_x() == 0) write_forced(p, row, set, kept_of(p, seq_len), chosen);
    return;
  }
  unsigned* counter = p.arrivals + static_cast<int64_t>(row) * p.num_heads + set;
  if (!arrives_last(counter, sharers)) return;
  choose(p, row, set, mass, digit_counts, chosen);
}

}  // namespace tidal
