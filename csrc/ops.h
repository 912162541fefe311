// The four ops. tidal_vllm/kernels/reference defines what they compute. Each checks its
// arguments (std::invalid_argument names the argument, its value and what is allowed),
// then launches kernels. It allocates no device memory and never waits for the device, so
// a CUDA graph can capture it.
#pragma once

#include "arguments.h"

namespace tidal {

void dense_decode(const AttendArguments& arguments);
void score_blocks(const AttendArguments& arguments);
void sparse_decode(const AttendArguments& arguments);
void select_blocks(const SelectArguments& arguments);

}  // namespace tidal
