#include "primitives.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

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
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kPage = 4096;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  char* to;
  const char* from;
  bool valid;
};

struct Fiber {
  void* stack_pointer;
  char* stack;  // lowest usable byte
  void* fake_stack = nullptr;
  int thread = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned waits_since = 0;
  const char* at = "the start";
  unsigned exchanges = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  Barrier barrier;
  char slots[2][32 * kSlotBytes];
  const char* what[2];
  bool in_sync = false;  // the lanes that wait do so at sync_warp
  bool unsynced_copies = false;
};

struct Block {
  Dim index;
  std::vector<Warp> warps;
  Barrier barrier;
  std::unique_ptr<char[]> shared;
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Block* block = nullptr;
  const std::function<void()>* kernel = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string error;
} machine;

unsigned schedule_seed = 0;

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
  fiber.done = true;
  leave(true);
  std::abort();
}

void prepare(Fiber& fiber, int thread) {
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
  fiber.thread = thread;
  // The stack looks as tidal_switch leaves it: six registers, then the address to go on
  // at. A null return address stands above, so that the ABI's alignment holds.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void arrive(Barrier& barrier, const char* at) {
  Fiber& fiber = *machine.current;
  fiber.at = at;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  fiber.waits_for = &barrier;
  fiber.waits_since = barrier.generation;
  leave(false);
}

bool blocked(const Fiber& fiber) {
  return fiber.waits_for && fiber.waits_for->generation == fiber.waits_since;
}

Warp& my_warp() { return machine.block->warps[machine.current->thread / 32]; }

void run_block(int threads, std::vector<int>& order, std::mt19937& random) {
  int live = threads;
  bool progress = true;
  while (live > 0) {
    // In a random schedule most warps sleep in each round, so that one warp can get far
    // ahead of another.
    unsigned awake = ~0u;
    if (schedule_seed > 1) {
      std::shuffle(order.begin(), order.end(), random);
      if (progress) awake = static_cast<unsigned>(random() & random());
    }
    progress = false;
    for (int thread : order) {
      Fiber& fiber = machine.fibers[thread];
      if (fiber.done || blocked(fiber) || !(awake >> thread / 32 & 1)) continue;
      fiber.waits_for = nullptr;
      resume(fiber);
      progress = true;
      if (!machine.error.empty()) throw std::runtime_error(machine.error);
      if (fiber.done) --live;
    }
    if (!progress && awake == ~0u) {
      std::string where = "deadlock:";
      for (const Fiber& fiber : machine.fibers) {
        if (fiber.thread < threads && !fiber.done && fiber.thread % 32 < 2) {
          where += " thread " + std::to_string(fiber.thread) + " at " + fiber.at + ";";
        }
      }
      throw std::runtime_error(where);
    }
  }
}

}  // namespace

// Ends the launch with an error: this fiber never goes on.
void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (machine.current == nullptr) throw std::runtime_error(text);
  machine.error = "thread " + std::to_string(machine.current->thread) + ": " + text;
  for (;;) leave(false);
}

void set_schedule(unsigned schedule) { schedule_seed = schedule; }

void launch(Dim grid, int threads, int shared_bytes,
            const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024) fail("%d threads", threads);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) {
    fail("grid of %d, %d, %d blocks", grid.x, grid.y, grid.z);
  }
  machine.kernel = &kernel;
  machine.error.clear();
  const auto count = static_cast<size_t>(threads);
  if (machine.fibers.size() < count) machine.fibers.resize(count);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule_seed == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(schedule_seed);
  Block block;
  block.shared.reset(new char[shared_bytes]);
  block.warps.resize(threads / 32);
  machine.block = &block;
  const int blocks = grid.x * grid.y * grid.z;
  for (int i = 0; i < blocks; ++i) {
    const int n = schedule_seed == 1 ? blocks - 1 - i : i;
    block.index = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    std::memset(block.shared.get(), 0xff, shared_bytes);
    block.barrier = Barrier{threads};
    for (Warp& warp : block.warps) {
      warp.barrier = Barrier{32};
      warp.unsynced_copies = false;
    }
    for (int thread = 0; thread < threads; ++thread) {
      prepare(machine.fibers[thread], thread);
    }
    run_block(threads, order, random);
  }
  machine.current = nullptr;
  machine.block = nullptr;
}

int thread_index() { return machine.current->thread; }
Dim block_index() { return machine.block->index; }
char* shared_memory() { return machine.block->shared.get(); }

void sync_block() {
  Barrier& barrier = machine.block->barrier;
  if (barrier.arrived + 1 == barrier.expected) {
    for (Warp& warp : machine.block->warps) warp.unsynced_copies = false;
  }
  arrive(barrier, "sync_block");
}

void sync_warp() {
  Warp& warp = my_warp();
  if (warp.barrier.arrived == 0) warp.in_sync = true;
  if (!warp.in_sync) fail("sync_warp while other lanes are at %s", "a warp instruction");
  if (warp.barrier.arrived + 1 == warp.barrier.expected) warp.unsynced_copies = false;
  arrive(warp.barrier, "sync_warp");
}

void check_readable(const char* what) {
  if (my_warp().unsynced_copies) fail("%s without a barrier after wait_copies", what);
}

const char* exchange(const void* value, int bytes, const char* what) {
  Fiber& fiber = *machine.current;
  Warp& warp = my_warp();
  const int parity = fiber.exchanges++ % 2;
  if (bytes > kSlotBytes) fail("%s of %d bytes", what, bytes);
  if (warp.barrier.arrived == 0) {
    warp.what[parity] = what;
    warp.in_sync = false;
  }
  if (warp.in_sync) fail("%s while other lanes are at sync_warp", what);
  if (std::strcmp(warp.what[parity], what) != 0) {
    fail("%s while other lanes are at %s", what, warp.what[parity]);
  }
  std::memcpy(warp.slots[parity] + fiber.thread % 32 * kSlotBytes, value, bytes);
  arrive(warp.barrier, what);
  return warp.slots[parity];
}

void copy_async(char* to, const char* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("copy_async_16 with an address that is not a multiple of 16");
  }
  std::memset(to, 0xff, 16);
  machine.current->open_group.push_back({to, from, valid});
}

void commit_copies() {
  Fiber& fiber = *machine.current;
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void wait_copies(int pending) {
  Fiber& fiber = *machine.current;
  while (fiber.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    fiber.groups.pop_front();
  }
  my_warp().unsynced_copies = true;
}

}  // namespace tidal::emulation
