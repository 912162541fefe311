// How a kernel is launched: launch.cuh.
#include <map>
#include <mutex>
#include <utility>

#include "launch.cuh"

// 0 builds a module that launches each kernel when the one in front of it has ended, to
// measure what programmatic dependent launch is worth.
#ifndef TIDAL_PROGRAMMATIC_LAUNCH
#define TIDAL_PROGRAMMATIC_LAUNCH 1
#endif

namespace tidal {
namespace {

// What is set up, or found out, once for a kernel on a device.
struct Prepared {
  cudaFuncAttributes attributes;
  bool programmatic;
};

Prepared prepare(const Kernel& kernel) {
  const void* function = kernel.function;
  if (kernel.shared_bytes > 48 << 10) {  // more has to be asked for
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kernel.shared_bytes),
               kernel.name);
  }
  // All of the processor's memory that may be shared: two thread blocks need most of it.
  // The same for all kernels, so that a processor never changes over between them.
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             kernel.name);
  Prepared prepared{};
  check_cuda(cudaFuncGetAttributes(&prepared.attributes, function), kernel.name);
  // A kernel waits for those in front of it only if it was compiled for sm_90 or later.
  // What PTX of an older one becomes on a newer GPU does not.
  prepared.programmatic =
      TIDAL_PROGRAMMATIC_LAUNCH && prepared.attributes.ptxVersion >= 90;
  return prepared;
}

const Prepared& prepared(const Kernel& kernel, int device_index) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Prepared> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(kernel.function, device_index);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, prepare(kernel)).first->second;
}

}  // namespace

void launch_kernel(const Kernel& kernel, dim3 grid, void* params, const Stream& stream) {
  cudaLaunchAttribute programmatic{};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &programmatic;
  config.numAttrs = prepared(kernel, stream.device_index).programmatic ? 1 : 0;
  void* arguments[] = {params};
  check_cuda(cudaLaunchKernelExC(&config, kernel.function, arguments), kernel.name);
}

KernelUse use_of_kernel(const Kernel& kernel, int device_index) {
  const Prepared& known = prepared(kernel, device_index);
  KernelUse use{};
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &use.blocks_per_processor, kernel.function, kernel.threads, kernel.shared_bytes),
      kernel.name);
  use.threads = kernel.threads;
  use.registers = known.attributes.numRegs;
  use.shared_bytes = kernel.shared_bytes;
  use.local_bytes = static_cast<int>(known.attributes.localSizeBytes);
  use.binary_version = known.attributes.binaryVersion;
  use.ptx_version = known.attributes.ptxVersion;
  use.programmatic = known.programmatic;
  return use;
}

}  // namespace tidal
