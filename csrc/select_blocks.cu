#include "select_blocks.cuh"

#include "launch.cuh"

namespace tidal {

void launch_select_blocks(const SelectParams& p, const Stream& stream) {
  const OnDevice on_device(stream);
  const int blocks = larger(1, ceil_div(p.num_blocks, kMassThreads));
  launch_kernel("sum_masses", sum_masses, dim3(blocks, p.num_sets, p.num_rows),
                kMassThreads, 0, p, stream);
  launch_kernel("choose_blocks", choose_blocks, dim3(p.num_sets, p.num_rows),
                kChooseThreads, sizeof(ChooseShared), p, stream);
}

}  // namespace tidal
