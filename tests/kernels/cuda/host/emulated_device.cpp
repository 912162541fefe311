// csrc/launch.h for the emulation: tensors are on the CPU, streams do not exist.
#include <stdexcept>

#include "dense_decode.cuh"
#include "launch.h"
#include "merge_splits.cuh"
#include "select_blocks.cuh"
#include "sparse_decode.cuh"

namespace tidal {

const char* const kDeviceType = "cpu";

namespace emulation {
int processors = 132;
}

int count_processors(int) { return emulation::processors; }
Stream current_stream(int) { return {0, nullptr}; }

namespace {

using emulation::Dim;

Dim grid_of(const AttendParams& p) { return {thread_blocks(p), p.splits, p.num_seqs}; }

template <bool kReadValues>
void launch_densely(const AttendParams& p, const Stream& stream) {
  for_shape<kReadValues>(p, [&](auto shape) {
    using S = decltype(shape);
    emulation::launch(grid_of(p), S::threads, S::shared_bytes,
                      [&] { dense_decode_kernel<S>(p); });
  });
  launch_merge(p, stream);
}

}  // namespace

void launch_merge(const AttendParams& p, const Stream&) {
  if (p.splits == 1) return;
  emulation::launch(Dim{p.num_heads, p.num_seqs}, kMergeThreads, 0, [&] {
    p.element == Element::kBf16 ? merge_splits_kernel<bf16>(p)
                                : merge_splits_kernel<fp16>(p);
  });
}

void launch_dense_decode(const AttendParams& p, const Stream& stream) {
  launch_densely<true>(p, stream);
}

void launch_score_blocks(const AttendParams& p, const Stream& stream) {
  launch_densely<false>(p, stream);
}

void launch_sparse_decode(const AttendParams& p, const Stream& stream) {
  for_shape<true>(p, [&](auto shape) {
    using S = decltype(shape);
    emulation::launch(grid_of(p), S::threads, S::shared_bytes,
                      [&] { sparse_decode_kernel<S>(p); });
  });
  launch_merge(p, stream);
}

void launch_select_blocks(const SelectParams& p, const Stream&) {
  const int blocks = larger(1, ceil_div(p.num_blocks, kMassThreads));
  emulation::launch(Dim{blocks, p.num_sets, p.num_seqs}, kMassThreads, 0,
                    [&] { set_mass(p); });
  emulation::launch(Dim{p.num_sets, p.num_seqs}, kChooseThreads, sizeof(ChooseShared),
                    [&] { choose_blocks(p); });
}

}  // namespace tidal
