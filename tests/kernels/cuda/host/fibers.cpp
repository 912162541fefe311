#include "fibers.h"

#include <sys/mman.h>

#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "The fibers are switched in x86-64 assembly."
#endif

// Saves the registers that a call must preserve, stores the stack pointer in *from, and
// goes on where the stack pointer `to` was stored.
asm(R"(
.text
.globl tidal_switch
.type tidal_switch, @function
tidal_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tidal_switch, .-tidal_switch
)");
extern "C" void tidal_switch(void** from, void* to);

namespace tidal::emulation {

Machine machine;
unsigned schedule_seed = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kPage = 4096;

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  Fiber& fiber = *machine.current;
  (*machine.kernel)();
  if (!fiber.open_group.empty() || !fiber.groups.empty()) {
    fail("copies that nobody waited for at the end");
  }
  if (!fiber.waited) fail("the end without wait_for_earlier_kernels");
  auto& left = machine.unfenced;
  left.insert(left.end(), fiber.stores.begin(), fiber.stores.end());
  fiber.done = true;
  leave(true);
  std::abort();
}

}  // namespace

void leave(bool for_good) {
  Fiber& fiber = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack,
                                 machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  (void)for_good;
  tidal_switch(&fiber.stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  tidal_switch(&machine.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void prepare(Fiber& fiber, Block& block, int thread) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      throw std::runtime_error("no memory for a fiber's stack");
    }
    fiber.stack = static_cast<char*>(memory) + kPage;
  }
  char* const stack = fiber.stack;
#if defined(__SANITIZE_ADDRESS__)
  // Frames that never returned have left the stack poisoned.
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  fiber = Fiber{};
  fiber.stack = stack;
  fiber.block = &block;
  fiber.thread = thread;
  // The stack looks as tidal_switch leaves it: six registers, then the address to go on
  // at. A null return address stands above, so that the ABI's alignment holds.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void pause() {
  if (schedule_seed > 1 && machine.random() % 2) leave(false);
}

}  // namespace tidal::emulation
