#include "sparse_decode.cuh"

#include "launch_attend.cuh"

namespace tidal {
namespace {

constexpr char kName[] = "sparse_decode";
constexpr auto kKernelOf = [](auto shape) { return sparse_decode_kernel<decltype(shape)>; };

}  // namespace

void launch_sparse_decode(const AttendParams& p, const Stream& stream) {
  launch_attend<true>(kName, p, stream, kKernelOf);
}

KernelUse use_of_sparse_decode(const AttendParams& p, int device_index) {
  return use_of_attend<true>(kName, p, device_index, kKernelOf);
}

}  // namespace tidal
