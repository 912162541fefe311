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

// What a compiled kernel takes of a GPU.
struct KernelUse {
  int blocks_per_processor;  // thread blocks that fit on a multiprocessor at once
  int threads;               // of a thread block
  int registers;             // of a thread
  int shared_bytes;          // of a thread block
  int local_bytes;           // of a thread: spilled registers
  int binary_version;        // compute capability * 10 of the machine code that runs
  int ptx_version;           // and of what it was compiled for
  bool programmatic;         // launched while the kernel in front of it still runs
};

// The kernel that an op launches for the parameters' types and head size.
KernelUse use_of_dense_decode(const AttendParams& p, int device_index);
KernelUse use_of_score_blocks(const AttendParams& p, int device_index);
KernelUse use_of_sparse_decode(const AttendParams& p, int device_index);
KernelUse use_of_select_blocks(int device_index);

// Each throws std::runtime_error if the launch fails.
void launch_dense_decode(const AttendParams& p, const Stream& stream);
void launch_score_blocks(const AttendParams& p, const Stream& stream);
void launch_sparse_decode(const AttendParams& p, const Stream& stream);
void launch_select_blocks(const SelectParams& p, const Stream& stream);

}  // namespace tidal
