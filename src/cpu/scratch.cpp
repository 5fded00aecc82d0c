// SPDX-License-Identifier: MIT
#include "cpu/scratch.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "natten/cpu/parallel.hpp"

namespace natten::cpu {

namespace {

struct Block {
  void* memory;
  std::size_t bytes;
  std::thread::id user;  // who has it, or had it last
  bool is_taken;
  bool is_kept;
};

// No more blocks than were in use at the same time, each as large as was needed, or kKeptScratchBytes.
class Blocks {
 public:
  void* take(std::size_t bytes) {
    std::lock_guard const lock(mutex_);
    auto const user = std::this_thread::get_id();
    Block* best = nullptr;
    Block* largest_idle = nullptr;
    for (Block& block : blocks_) {
      if (block.is_taken) continue;
      if (largest_idle == nullptr || block.bytes > largest_idle->bytes) largest_idle = &block;
      if (block.bytes >= bytes && (best == nullptr || is_better(block, *best, user))) best = &block;
    }
    if (best == nullptr) {
      if (largest_idle != nullptr) unmap(*largest_idle);
      blocks_.reserve(blocks_.size() + 1);
      best = &blocks_.emplace_back(map(bytes));
    }
    best->user = user;
    best->is_taken = true;
    best->is_kept = best->bytes <= kKeptScratchBytes;
    set_end(*best, bytes);
    return best->memory;
  }

  void give_back(void* memory) {
    std::lock_guard const lock(mutex_);
    for (Block& block : blocks_) {
      if (block.memory != memory) continue;
      block.is_taken = false;
      if (!block.is_kept) unmap(block);
      return;
    }
  }

  std::size_t release() {
    std::lock_guard const lock(mutex_);
    std::size_t bytes = 0;
    for (std::size_t i = blocks_.size(); i-- > 0;) {
      bytes += blocks_[i].bytes;
      if (blocks_[i].is_taken) blocks_[i].is_kept = false;
      else unmap(blocks_[i]);
    }
    return bytes;
  }

  void lock() {
    mutex_.lock();
    is_locked_ = true;
  }
  void unlock() {
    is_locked_ = false;
    mutex_.unlock();
  }
  void forget() {
    if (!is_locked_) lock();
    while (!blocks_.empty()) unmap(blocks_.back());
    unlock();
  }

 private:
  // A block that the thread has used is in its caches, and in the memory of its socket.
  static bool is_better(Block const& block, Block const& than, std::thread::id user) {
    if ((block.user == user) != (than.user == user)) return block.user == user;
    return block.bytes < than.bytes;
  }

  static Block map(std::size_t bytes) {
    auto const page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    bytes = std::max(page, (bytes + page - 1) / page * page);
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return {memory, bytes, {}, false, true};
  }

  // Lets AddressSanitizer find accesses behind what was asked for.
  static void set_end([[maybe_unused]] Block const& block, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block.memory, bytes);
    __asan_poison_memory_region(static_cast<char*>(block.memory) + bytes, block.bytes - bytes);
#endif
  }

  void unmap(Block& block) {
    set_end(block, block.bytes);
    munmap(block.memory, block.bytes);
    block = blocks_.back();
    blocks_.pop_back();
  }

  std::mutex mutex_;
  bool is_locked_ = false;  // for a fork
  std::vector<Block> blocks_;
};

// Never destroyed: threads may outlive static objects.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

struct Workspace {
  void* memory = nullptr;
  std::size_t bytes = 0;
};

thread_local Workspace workspace;

}  // namespace

void* take_scratch(std::size_t bytes) { return blocks().take(bytes); }

void return_scratch(void* memory) { blocks().give_back(memory); }

void* thread_workspace(std::size_t bytes) {
  if (workspace.memory == nullptr || bytes > workspace.bytes) {
    return_thread_workspace();
    workspace = {take_scratch(bytes), bytes};
  }
  return workspace.memory;
}

void return_thread_workspace() {
  if (workspace.memory == nullptr) return;
  return_scratch(workspace.memory);
  workspace = {};
}

std::size_t release_scratch() { return blocks().release(); }

void lock_scratch() { blocks().lock(); }

void unlock_scratch() { blocks().unlock(); }

void forget_scratch() { blocks().forget(); }

}  // namespace natten::cpu
