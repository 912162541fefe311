#include "select_blocks.cuh"

#include "launch.cuh"

namespace tidal {

void launch_select_blocks(const SelectParams& p, const Stream& stream) {
  const OnDevice on_device(stream);
  launch_kernel("select_blocks", select_blocks_kernel,
                dim3(count_tiles(p), p.num_sets, p.num_rows), kSelectThreads,
                kSelectSharedBytes, p, stream);
}

}  // namespace tidal
