// csrc/launch.h for the emulation: tensors are on the CPU, and there are no streams.
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

void launch_merge(const AttendParams& p) {
  if (p.splits == 1) return;
  emulation::launch(Dim{p.num_heads, p.num_rows}, kMergeThreads, 0, [&] {
    p.element == Element::kBf16 ? merge_splits_kernel<bf16>(p)
                                : merge_splits_kernel<fp16>(p);
  });
}

template <bool kReadValues, class KernelOf>
void launch_attend(const AttendParams& p, const KernelOf& kernel_of) {
  for_shape<kReadValues>(p, [&](auto shape) {
    using S = decltype(shape);
    emulation::launch(Dim{thread_blocks(p), p.splits, p.num_rows}, S::threads,
                      S::shared_bytes, [&] { kernel_of(shape)(p); });
  });
  launch_merge(p);
}

}  // namespace

void launch_dense_decode(const AttendParams& p, const Stream&) {
  launch_attend<true>(p, [](auto shape) { return dense_decode_kernel<decltype(shape)>; });
}

void launch_score_blocks(const AttendParams& p, const Stream&) {
  launch_attend<false>(p,
                       [](auto shape) { return dense_decode_kernel<decltype(shape)>; });
}

void launch_sparse_decode(const AttendParams& p, const Stream&) {
  launch_attend<true>(p,
                      [](auto shape) { return sparse_decode_kernel<decltype(shape)>; });
}

void launch_select_blocks(const SelectParams& p, const Stream&) {
  const int blocks = larger(1, ceil_div(p.num_blocks, kMassThreads));
  emulation::launch(Dim{blocks, p.num_sets, p.num_rows}, kMassThreads, 0,
                    [&] { sum_masses(p); });
  emulation::launch(Dim{p.num_sets, p.num_rows}, kChooseThreads, sizeof(ChooseShared),
                    [&] { choose_blocks(p); });
}

}  // namespace tidal
