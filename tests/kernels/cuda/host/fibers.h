// The state of the emulation, and its threads as fibers: for the files of this folder.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "primitives.cuh"

namespace tidal::emulation {

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

// Of four bytes to a published number.
struct Store {
  void* to;
  uint32_t word;
  bool adds;  // the word, to what is there
};

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
  std::unordered_map<const void*, uint32_t> fenced;  // L2: what was published and fenced
  std::vector<Store> unfenced;  // what threads have left behind
  std::vector<std::pair<void*, size_t>> guarded;
  std::mt19937 random;
  const std::function<void()>* kernel = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string error;
};

extern Machine machine;
extern unsigned schedule_seed;

inline Block& my_block() { return *machine.current->block; }
inline Warp& my_warp() { return my_block().warps[machine.current->thread / 32]; }

// Makes a fiber ready to run a thread of a thread block from the kernel's start.
void prepare(Fiber& fiber, Block& block, int thread);
// Lets a fiber run until it leaves.
void resume(Fiber& fiber);
// Goes back to the scheduler, which resumes the fiber unless it left for good.
void leave(bool for_good);
// In a random schedule, lets other threads run first, sometimes.
void pause();

// Memory that kernels must not touch yet: closed or open.
void set_guards(bool closed);
// Writes to memory what threads have published.
void write_published();

}  // namespace tidal::emulation
