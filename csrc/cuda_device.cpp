// What only PyTorch knows of a CUDA device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <stdexcept>

#include "launch.h"

namespace tidal {

const char* const kDeviceType = "cuda";

Stream current_stream(int device_index) {
  void* handle = nullptr;
  if (aoti_torch_get_current_cuda_stream(device_index, &handle) != 0) {
    throw std::runtime_error("no current stream on cuda:" + std::to_string(device_index));
  }
  return {device_index, handle};
}

}  // namespace tidal
