#include "dense_decode.cuh"

#include "launch_attend.cuh"

namespace tidal {

void launch_score_blocks(const AttendParams& p, const Stream& stream) {
  launch_attend<false>("score_blocks", p, stream,
                       [](auto shape) { return dense_decode_kernel<decltype(shape)>; });
}

}  // namespace tidal
