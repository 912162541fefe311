// What the ops need of a device: the .cu files for CUDA, an emulation in the tests.
#pragma once

#include "params.h"

namespace tidal {

using Stream = void*;

extern const char* const kDeviceType;  // that the tensors must be on

int count_processors(int device_index);
Stream current_stream(int device_index);

// On the current device. Each throws std::runtime_error if the launch fails.
void launch_dense_decode(const AttendParams& p, Stream stream);
void launch_sparse_decode(const AttendParams& p, Stream stream);
void launch_select_blocks(const SelectParams& p, Stream stream);

}  // namespace tidal
