// Launching on a stream, with every error an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace tidal {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a stream's device current for its lifetime.
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
  if (shared_bytes > 48 << 10) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes),
               name);
  }
  const auto on = static_cast<cudaStream_t>(stream.handle);
  kernel<<<grid, threads, shared_bytes, on>>>(params);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace tidal
