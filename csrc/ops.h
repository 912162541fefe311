// The four ops. tidal_vllm/kernels/reference defines what they compute. Each checks its
// arguments (std::invalid_argument names the argument, its value and what is allowed),
// then launches kernels. It allocates no device memory and never waits for the device, so
// a CUDA graph can capture it.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace tidal {

void dense_decode(const AttendArguments& arguments);
void score_blocks(const AttendArguments& arguments);
void sparse_decode(const AttendArguments& arguments);
void select_blocks(const SelectArguments& arguments);

// What the kernel of an op takes of a GPU, for benchmarks to print: the fields of
// KernelUse (launch.h), in that order. `dtype` is the query's, `kv_cache_dtype` the
// cache's; select_blocks has one kernel, whatever the types and the head size.
std::vector<int64_t> occupancy(const std::string& op, const std::string& dtype,
                               const std::string& kv_cache_dtype, int64_t head_size,
                               int64_t device_index);

}  // namespace tidal
