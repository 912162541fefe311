// Launches kernels on a stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "launch.h"

namespace tidal {

// Makes a device the current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device_index) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device_index;
    if (changed_) check_cuda(cudaSetDevice(device_index), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A kernel and how its thread blocks are shaped.
struct Kernel {
  const char* name;
  const void* function;
  int threads;
  int shared_bytes;
};

// Both work on the current device, whose index they are told.
void launch_kernel(const Kernel& kernel, dim3 grid, void* params, const Stream& stream);
KernelUse use_of_kernel(const Kernel& kernel, int device_index);

template <class Params>
void launch_kernel(const Kernel& kernel, dim3 grid, const Params& params,
                   const Stream& stream) {
  Params copy = params;  // CUDA asks for a pointer to what is not const
  launch_kernel(kernel, grid, static_cast<void*>(&copy), stream);
}

}  // namespace tidal
