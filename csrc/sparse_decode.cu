#include "sparse_decode.cuh"

#include "launch_attend.cuh"

namespace tidal {

void launch_sparse_decode(const AttendParams& p, const Stream& stream) {
  launch_attend<true>("sparse_decode", p, stream,
                      [](auto shape) { return sparse_decode_kernel<decltype(shape)>; });
}

}  // namespace tidal
