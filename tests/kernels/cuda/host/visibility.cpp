// What thread blocks see of each other's writes, and kernels of the ones before.
#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tidal::emulation {

void set_guards(bool closed) {
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& [memory, bytes] : machine.guarded) {
    closed ? __asan_poison_memory_region(memory, bytes)
           : __asan_unpoison_memory_region(memory, bytes);
  }
#endif
  (void)closed;
}

void write_published() {
  for (const auto& [to, value] : machine.fenced) *const_cast<float*>(to) = value;
  for (const auto& [to, value] : machine.unfenced) *to = value;
  machine.fenced.clear();
  machine.unfenced.clear();
}

void guard(void* memory, size_t bytes) { machine.guarded.emplace_back(memory, bytes); }

void wait_for_earlier_kernels() {
  machine.current->waited = true;
  set_guards(false);
}

void let_later_kernels_start() {
  if (!machine.current->waited) {
    fail("let_later_kernels_start without wait_for_earlier_kernels");
  }
}

void fence_device() {
  pause();
  for (const auto& [to, value] : machine.current->stores) machine.fenced[to] = value;
  machine.current->stores.clear();
  pause();
}

void publish(float* to, float value) {
  *static_cast<volatile float*>(to) = *to;  // so that a sanitizer sees a wrong address
  machine.current->stores.emplace_back(to, value);
}

float read_published(const float* from) {
  const auto found = machine.fenced.find(from);
  return found == machine.fenced.end() ? *from : found->second;
}

unsigned atomic_inc_wrapping(unsigned* counter, unsigned most) {
  pause();
  const unsigned before = *counter;
  *counter = before >= most ? 0 : before + 1;
  return before;
}

void check_quad(const float* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    fail("four floats at an address that is not a multiple of 16");
  }
}

}  // namespace tidal::emulation
