// What thread blocks see of each other's writes, and kernels of the ones before.
#include "fibers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tidal::emulation {
namespace {

// Makes a store visible to read_published.
void show(const Store& store) {
  machine.fenced[store.to] = store.word + (store.adds ? read_published(store.to) : 0);
}

}  // namespace

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
  for (const Store& store : machine.unfenced) show(store);
  for (const auto& [to, word] : machine.fenced) {
    std::memcpy(const_cast<void*>(to), &word, 4);
  }
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
  for (const Store& store : machine.current->stores) show(store);
  machine.current->stores.clear();
  pause();
}

void publish(void* to, uint32_t word) {
  volatile uint32_t* there = static_cast<uint32_t*>(to);
  *there = *there;  // so that a sanitizer sees a wrong address
  machine.current->stores.push_back({to, word, false});
}

void add_published(int* to, int value) {
  publish(to, static_cast<uint32_t>(value));
  machine.current->stores.back().adds = true;
}

uint32_t read_published(const void* from) {
  const auto found = machine.fenced.find(from);
  if (found != machine.fenced.end()) return found->second;
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
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
