#include "fibers.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <stdexcept>

namespace tidal::emulation {
namespace {

// In a random schedule.
constexpr int kBlocksAtOnce = 8;
constexpr int kRoundsAsleep = 32;

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
  int round = 0, asleep_in_vain = 0;
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
    // In a random schedule a quarter of the warps sleep for some rounds, so that one warp
    // can get far ahead of another.
    const bool all_awake = schedule_seed <= 1 || (!progress && asleep_in_vain++ > 8);
    if (all_awake || !progress || round % kRoundsAsleep == 0) {
      for (size_t warp = 0; warp < awake.size(); ++warp) {
        awake[warp] = all_awake || machine.random() % 4 != 0;
      }
    }
    ++round;
    if (schedule_seed > 1) std::shuffle(order.begin(), order.end(), machine.random);
    progress = run_round(order, awake);
    if (progress) asleep_in_vain = 0;
    if (!progress && all_awake) report_deadlock(order);
  }
}

void end_launch() {
  set_guards(false);
  machine.current = nullptr;
  write_published();
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
