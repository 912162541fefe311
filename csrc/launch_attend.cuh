// Launches a kernel that attends, compiled for the parameters' shape.
#pragma once

#include "launch.cuh"
#include "tile.cuh"

namespace tidal {

// `kernel_of(shape)` returns the kernel that is compiled for a Shape.
template <bool kReadValues, class KernelOf, class Use>
void for_kernel(const char* name, const AttendParams& p, const KernelOf& kernel_of,
                Use&& use) {
  for_shape<kReadValues>(p, [&](auto shape) {
    using S = decltype(shape);
    const auto function = reinterpret_cast<const void*>(kernel_of(shape));
    use(Kernel{name, function, S::threads, S::shared_bytes});
  });
}

template <bool kReadValues, class KernelOf>
void launch_attend(const char* name, const AttendParams& p, const Stream& stream,
                   const KernelOf& kernel_of) {
  const OnDevice on_device(stream.device_index);
  const dim3 grid(thread_blocks(p), p.splits, p.num_rows);
  for_kernel<kReadValues>(name, p, kernel_of, [&](const Kernel& kernel) {
    launch_kernel(kernel, grid, p, stream);
  });
}

template <bool kReadValues, class KernelOf>
KernelUse use_of_attend(const char* name, const AttendParams& p, int device_index,
                        const KernelOf& kernel_of) {
  const OnDevice on_device(device_index);
  KernelUse use{};
  for_kernel<kReadValues>(name, p, kernel_of, [&](const Kernel& kernel) {
    use = use_of_kernel(kernel, device_index);
  });
  return use;
}

}  // namespace tidal
