#include "dense_decode.cuh"

#include "launch_attend.cuh"

namespace tidal {
namespace {

constexpr char kName[] = "score_blocks";
constexpr auto kKernelOf = [](auto shape) { return dense_decode_kernel<decltype(shape)>; };

}  // namespace

void launch_score_blocks(const AttendParams& p, const Stream& stream) {
  launch_attend<false>(kName, p, stream, kKernelOf);
}

KernelUse use_of_score_blocks(const AttendParams& p, int device_index) {
  return use_of_attend<false>(kName, p, device_index, kKernelOf);
}

}  // namespace tidal
