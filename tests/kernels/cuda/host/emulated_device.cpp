// csrc/launch.h for the emulation: tensors are on the CPU, and there are no streams.
#include <stdexcept>

#include "dense_decode.cuh"
#include "launch.h"
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

template <bool kReadValues, class KernelOf>
void launch_attend(const AttendParams& p, const KernelOf& kernel_of) {
  for_shape<kReadValues>(p, [&](auto shape) {
    using S = decltype(shape);
    emulation::launch(Dim{thread_blocks(p), p.splits, p.num_rows}, S::threads,
                      S::shared_bytes, [&] { kernel_of(shape)(p); });
  });
}

// As far as it is known without a GPU.
template <bool kReadValues>
KernelUse use_of_attend(const AttendParams& p) {
  KernelUse use{};
  for_shape<kReadValues>(p, [&](auto shape) {
    use.threads = decltype(shape)::threads;
    use.shared_bytes = decltype(shape)::shared_bytes;
  });
  return use;
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

KernelUse use_of_dense_decode(const AttendParams& p, int) { return use_of_attend<true>(p); }
KernelUse use_of_score_blocks(const AttendParams& p, int) {
  return use_of_attend<false>(p);
}
KernelUse use_of_sparse_decode(const AttendParams& p, int) {
  return use_of_attend<true>(p);
}
KernelUse use_of_select_blocks(int) {
  KernelUse use{};
  use.threads = kSelectThreads;
  use.shared_bytes = kSelectSharedBytes;
  return use;
}

void launch_select_blocks(const SelectParams& p, const Stream&) {
  emulation::launch(Dim{sharers_of(p), p.num_sets, p.num_rows}, kSelectThreads,
                    kSelectSharedBytes, [&] { select_blocks_kernel(p); });
}

}  // namespace tidal
