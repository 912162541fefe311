// Launches a kernel that attends, compiled for the parameters' shape, then merge_splits.
#pragma once

#include "launch.cuh"
#include "tile.cuh"

namespace tidal {

// Launches on the current device; does nothing where no row can have been split.
void launch_merge(const AttendParams& p, const Stream& stream);

// `kernel_of(shape)` returns the kernel that is compiled for a Shape.
template <bool kReadValues, class KernelOf>
void launch_attend(const char* name, const AttendParams& p, const Stream& stream,
                   const KernelOf& kernel_of) {
  const OnDevice on_device(stream);
  for_shape<kReadValues>(p, [&](auto shape) {
    using S = decltype(shape);
    launch_kernel(name, kernel_of(shape), dim3(thread_blocks(p), p.splits, p.num_rows),
                  S::threads, S::shared_bytes, p, stream);
  });
  launch_merge(p, stream);
}

}  // namespace tidal
