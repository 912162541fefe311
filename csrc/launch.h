// What the ops need of a device: the .cu files provide it for CUDA, the tests for their
// emulation.
#pragma once

#include "params.h"

namespace tidal {

struct Stream {
  int device_index;
  void* handle;
};

extern const char* const kDeviceType;  // where the tensors must be: "cuda"

int count_processors(int device_index);
Stream current_stream(int device_index);

// Each throws std::runtime_error if the launch fails.
void launch_dense_decode(const AttendParams& p, const Stream& stream);
void launch_score_blocks(const AttendParams& p, const Stream& stream);
void launch_sparse_decode(const AttendParams& p, const Stream& stream);
void launch_select_blocks(const SelectParams& p, const Stream& stream);

}  // namespace tidal
