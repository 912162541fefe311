#include "dense_decode.cuh"

#include "launch_attend.cuh"

namespace tidal {

void launch_dense_decode(const AttendParams& p, const Stream& stream) {
  launch_attend<true>("dense_decode", p, stream,
                      [](auto shape) { return dense_decode_kernel<decltype(shape)>; });
}

}  // namespace tidal
