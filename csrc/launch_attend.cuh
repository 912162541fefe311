// Launches a kernel that attends, compiled for the parameters' shape.
#pragma once

#include "launch.cuh"
#include "tile.cuh"

namespace tidal {

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
}

}  // namespace tidal
