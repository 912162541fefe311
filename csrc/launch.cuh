// Launches kernels on a stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "launch.h"

namespace tidal {

// Makes the stream's device the current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(const Stream& stream) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != stream.device_index) {
      check_cuda(cudaSetDevice(stream.device_index), "cudaSetDevice");
    }
    changed_ = before_ != stream.device_index;
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

template <class Params>
void launch_kernel(const char* name, void (*kernel)(const Params), dim3 grid, int threads,
                   int shared_bytes, const Params& params, const Stream& stream) {
  if (shared_bytes > 48 << 10) {  // more has to be asked for
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes),
               name);
  }
  const auto on = static_cast<cudaStream_t>(stream.handle);
  kernel<<<grid, threads, shared_bytes, on>>>(params);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace tidal
