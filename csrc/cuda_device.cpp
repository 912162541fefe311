// A CUDA device, as launch.h describes one; PyTorch knows its current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "cuda_check.h"
#include "launch.h"

namespace tidal {

const char* const kDeviceType = "cuda";

int count_processors(int device_index) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index),
             "cudaDeviceGetAttribute");
  return count;
}

Stream current_stream(int device_index) {
  void* handle = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &handle) != 0) {
    throw std::runtime_error("no current stream on cuda:" + std::to_string(device_index));
  }
  return {device_index, handle};
}

}  // namespace tidal
