// A tensor as the host code sees it, without PyTorch's headers.
#pragma once

#include <cstdint>
#include <string>

namespace tidal {

struct TensorView {
  void* data = nullptr;
  std::string dtype;   // as torch prints it, without "torch."
  std::string device;  // "cuda", "cpu", ...
  int device_index = -1;
  int rank = 0;
  int64_t sizes[4] = {1, 1, 1, 1};
  int64_t strides[4] = {1, 1, 1, 1};  // in elements

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t stride(int dim) const { return strides[dim]; }
};

// A tensor that an op writes.
struct WrittenTensor : TensorView {};

}  // namespace tidal
