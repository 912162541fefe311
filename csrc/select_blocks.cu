#include "select_blocks.cuh"

#include "launch.cuh"

namespace tidal {
namespace {

Kernel kernel() {
  const auto function = reinterpret_cast<const void*>(&select_blocks_kernel);
  return {"select_blocks", function, kSelectThreads, kSelectSharedBytes};
}

}  // namespace

void launch_select_blocks(const SelectParams& p, const Stream& stream) {
  const OnDevice on_device(stream.device_index);
  launch_kernel(kernel(), dim3(sharers_of(p), p.num_sets, p.num_rows), p, stream);
}

KernelUse use_of_select_blocks(int device_index) {
  const OnDevice on_device(device_index);
  return use_of_kernel(kernel(), device_index);
}

}  // namespace tidal
