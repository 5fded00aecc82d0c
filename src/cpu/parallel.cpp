// SPDX-License-Identifier: MIT
#include "natten/cpu/parallel.hpp"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/fork.hpp"
#include "cpu/scratch.hpp"

namespace natten::cpu {

namespace {

// Runs the body of a region on the calling thread.
void run(ParallelBody body, void* context, int thread) {
  struct AtTheEnd {
    ~AtTheEnd() { return_thread_workspace(); }
  } const at_the_end;
  body(context, thread);
}

class Region {
 public:
  Region(ParallelBody body, void* context) : body_(body), context_(context) {}

  // Every thread of the region calls this once. Threads number themselves: whoever lends them may lend fewer than
  // were asked for (nested regions, OMP_DYNAMIC).
  void enter() {
    try {
      run(body_, context_, next_thread_.fetch_add(1, std::memory_order_relaxed));
    } catch (...) {
      std::lock_guard const lock(mutex_);
      if (!exception_) exception_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  ParallelBody body_;
  void* context_;
  std::atomic<int> next_thread_{0};
  std::mutex mutex_;
  std::exception_ptr exception_;
};

// Exported by libgomp, and for its sake by LLVM's and Intel's OpenMP.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

std::atomic<bool> pool_is_dead{false};

// Looked up at the first region, when torch has long been imported and has brought its OpenMP along; linking one here
// would load a second copy, whose waiting threads would spin on the cores that torch's need (measured: 450 times slower).
GompParallel gomp_parallel() {
  if (pool_is_dead.load(std::memory_order_relaxed)) return nullptr;
  static std::atomic<GompParallel> found{nullptr};
  GompParallel function = found.load(std::memory_order_relaxed);
  if (!function) {
    function = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(function, std::memory_order_relaxed);
  }
  return function;
}

void run_on_own_threads(int num_threads, Region& region) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(static_cast<std::size_t>(num_threads) - 1);
    while (static_cast<int>(threads.size()) < num_threads - 1) threads.emplace_back([&region] { region.enter(); });
  } catch (std::system_error const&) {
    // The system grants no more threads: those that are there do the work.
  }
  region.enter();
  for (auto& thread : threads) thread.join();
}

}  // namespace

void parallel_region(int num_threads, ParallelBody body, void* context) {
  if (num_threads <= 1) return run(body, context, 0);
  Region region(body, context);
  if (auto const parallel = gomp_parallel()) {
    parallel([](void* data) { static_cast<Region*>(data)->enter(); }, &region, static_cast<unsigned>(num_threads), 0);
  } else {
    run_on_own_threads(num_threads, region);
  }
  region.rethrow();
}

void before_fork() { lock_scratch(); }

void after_fork_in_parent() { unlock_scratch(); }

void after_fork_in_child() {
  pool_is_dead.store(true, std::memory_order_relaxed);
  forget_scratch();
}

}  // namespace natten::cpu
