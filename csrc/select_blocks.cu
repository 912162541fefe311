#include "select_blocks.cuh"

#include "launch.cuh"

namespace tidal {

int count_processors(int device_index) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index),
             "cudaDeviceGetAttribute");
  return count;
}

void launch_select_blocks(const SelectParams& p, const Stream& stream) {
  const OnDevice on_device(stream);
  const int blocks = larger(1, ceil_div(p.num_blocks, kMassThreads));
  launch_kernel("set_mass", set_mass, dim3(blocks, p.num_sets, p.num_seqs), kMassThreads,
                0, p, stream);
  launch_kernel("choose_blocks", choose_blocks, dim3(p.num_sets, p.num_seqs),
                kChooseThreads, sizeof(ChooseShared), p, stream);
}

}  // namespace tidal
