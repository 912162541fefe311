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
#include <unordered_map>
#include <utility>
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
constexpr int kBlocksAtOnce = 3;  // in a random schedule

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  char* to;
  const char* from;
  bool valid;
};

struct Block;

using Store = std::pair<float*, float>;

struct Fiber {
  void* stack_pointer;
  char* stack;  // lowest usable byte
  void* fake_stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool waited = false;  // for earlier kernels
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned waits_since = 0;
  const char* at = "the start";
  unsigned exchanges = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  std::vector<Store> stores;  // since the last fence
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
  int live = 0;  // threads that have not ended
  std::vector<Warp> warps;
  Barrier barrier;
  bool any[2] = {false, false};  // of any_in_block, by the barrier's generation
  std::unique_ptr<char[]> shared;
};

struct Machine {
  std::vector<Fiber> fibers;  // those of one thread block, then those of the next
  Fiber* current = nullptr;
  std::unordered_map<const float*, float> fenced;  // L2: what was published and fenced
  std::vector<Store> unfenced;  // what threads have left behind
  std::vector<std::pair<void*, size_t>> guarded;
  std::mt19937 random;
  const std::function<void()>* kernel = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string error;
} machine;

unsigned schedule_seed = 0;

void set_guards(bool closed) {
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& [memory, bytes] : machine.guarded) {
    closed ? __asan_poison_memory_region(memory, bytes)
           : __asan_unpoison_memory_region(memory, bytes);
  }
#endif
  (void)closed;
}

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
  if (!fiber.waited) fail("the end without wait_for_earlier_kernels");
  auto& left = machine.unfenced;
  left.insert(left.end(), fiber.stores.begin(), fiber.stores.end());
  fiber.done = true;
  leave(true);
  std::abort();
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

Block& my_block() { return *machine.current->block; }
Warp& my_warp() { return my_block().warps[machine.current->thread / 32]; }

// In a random schedule, lets other threads run first, sometimes.
void pause() {
  if (schedule_seed > 1 && machine.random() % 2) leave(false);
}

void start(Block& block, Dim grid, int number, Fiber* fibers) {
  const int threads = static_cast<int>(block.warps.size()) * 32;
  block.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  block.live = threads;
  block.barrier = Barrier{threads};
  for (Warp& warp : block.warps) {
    warp.barrier = Barrier{32};
    warp.unsynced_copies = false;
  }
  for (int thread = 0; thread < threads; ++thread) prepare(fibers[thread], block, thread);
}

// Gives each thread one turn in the given order, unless it waits or its warp sleeps.
// Returns whether any thread went on.
bool run_round(const std::vector<int>& order, const std::vector<bool>& awake) {
  bool progress = false;
  for (int i : order) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.done || blocked(fiber) || !awake[i / 32]) continue;
    fiber.waits_for = nullptr;
    resume(fiber);
    progress = true;
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
    if (fiber.done) --fiber.block->live;
  }
  return progress;
}

[[noreturn]] void report_deadlock(const std::vector<int>& order) {
  std::string where = "deadlock:";
  for (int i : order) {
    const Fiber& fiber = machine.fibers[i];
    if (!fiber.done && fiber.thread % 32 < 2) {
      where += " thread " + std::to_string(fiber.thread) + " at " + fiber.at + ";";
    }
  }
  throw std::runtime_error(where);
}

// Runs the thread blocks of `numbers`, as many at once as there are `blocks`.
void run_blocks(Dim grid, const std::vector<int>& numbers, std::vector<Block>& blocks,
                size_t shared_bytes) {
  const int threads = static_cast<int>(blocks[0].warps.size()) * 32;
  const int at_once = static_cast<int>(blocks.size());
  std::vector<int> order(threads * at_once);
  std::iota(order.begin(), order.end(), 0);
  if (schedule_seed == 1) std::reverse(order.begin(), order.end());
  std::vector<bool> awake(order.size() / 32, true);
  size_t next = 0;
  bool progress = true;
  for (;;) {
    bool any_live = false;
    for (int slot = 0; slot < at_once; ++slot) {
      if (blocks[slot].live == 0 && next < numbers.size()) {
        if (at_once == 1) set_guards(true);
        std::memset(blocks[slot].shared.get(), 0xff, shared_bytes);
        start(blocks[slot], grid, numbers[next++], &machine.fibers[slot * threads]);
      }
      any_live = any_live || blocks[slot].live > 0;
    }
    if (!any_live) return;
    // In a random schedule most warps sleep in each round, so that one warp can get far
    // ahead of another.
    const bool all_awake = schedule_seed <= 1 || !progress;
    for (size_t warp = 0; warp < awake.size(); ++warp) {
      awake[warp] = all_awake || machine.random() % 4 == 0;
    }
    if (schedule_seed > 1) std::shuffle(order.begin(), order.end(), machine.random);
    progress = run_round(order, awake);
    if (!progress && all_awake) report_deadlock(order);
  }
}

void end_launch() {
  set_guards(false);
  machine.current = nullptr;
  for (const auto& [to, value] : machine.fenced) *const_cast<float*>(to) = value;
  for (const auto& [to, value] : machine.unfenced) *to = value;
  machine.fenced.clear();
  machine.unfenced.clear();
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
  machine.random.seed(schedule_seed);
  std::vector<int> numbers(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (schedule_seed == 1) std::reverse(numbers.begin(), numbers.end());
  if (schedule_seed > 1) std::shuffle(numbers.begin(), numbers.end(), machine.random);
  const size_t at_once = schedule_seed > 1 ? kBlocksAtOnce : 1;
  std::vector<Block> blocks(std::min(at_once, numbers.size()));
  for (Block& block : blocks) {
    block.shared.reset(new char[shared_bytes]);
    block.warps.resize(threads / 32);
  }
  const size_t fibers = blocks.size() * threads;
  if (machine.fibers.size() < fibers) machine.fibers.resize(fibers);
  // Of an earlier launch, perhaps of other thread blocks.
  for (size_t i = 0; i < fibers; ++i) machine.fibers[i].done = true;
  set_guards(true);
  try {
    run_blocks(grid, numbers, blocks, shared_bytes);
  } catch (...) {
    end_launch();
    throw;
  }
  end_launch();
}

void guard(void* memory, size_t bytes) { machine.guarded.emplace_back(memory, bytes); }

int thread_index() { return machine.current->thread; }
Dim block_index() { return my_block().index; }
char* shared_memory() { return my_block().shared.get(); }

void sync_block() { any_in_block(false); }

bool any_in_block(bool yes) {
  Block& block = my_block();
  const unsigned now = block.barrier.generation % 2;
  block.any[now] = block.any[now] || yes;
  if (block.barrier.arrived + 1 == block.barrier.expected) {
    block.any[1 - now] = false;  // all threads have seen what it was
    for (Warp& warp : block.warps) warp.unsynced_copies = false;
  }
  arrive(block.barrier, "sync_block");
  return block.any[now];
}

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
