// How thread blocks that share a piece of work find out which of them ends last, so that
// it can go on with what all of them have left in global memory.
//
// A counter per piece of work goes up by one with each thread block, and wraps to 0 with
// the last. So it is 0 before each launch without being cleared, also inside a CUDA
// graph. Counters start as zeros and belong to one stream: two launches that use the same
// counters must not overlap.
#pragma once

#include "primitives.cuh"

namespace tidal {

// Called by all threads of each of `count` thread blocks. Returns true in the one that
// calls it last, where read_published then finds all that the others had published. It is
// a barrier of the thread block.
TIDAL_DEVICE bool arrives_last(unsigned* counter, int count) {
  fence_device();  // each thread makes visible what it has published,
  sync_block();    // and no thread block is counted before all its threads have
  bool last = false;
  if (thread_index() == 0) {
    const unsigned most = static_cast<unsigned>(count) - 1;
    last = atomic_inc_wrapping(counter, most) == most;
    if (last) fence_device();  // no later read goes in front of the atomic
  }
  return any_in_block(last);
}

}  // namespace tidal
