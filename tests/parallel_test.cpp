// SPDX-License-Identifier: MIT
// Compiled and run by test_core.py, together with src/cpu/parallel.cpp: what Python cannot see of it.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>

#include "cpu/fork.hpp"
#include "natten/cpu/parallel.hpp"

namespace {

void require(bool condition, char const* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

struct Seen {
  std::mutex mutex;
  std::multiset<int> threads;
};

void note(void* context, int thread) {
  auto& seen = *static_cast<Seen*>(context);
  std::lock_guard const lock(seen.mutex);
  seen.threads.insert(thread);
}

void test_numbers(int num_threads) {
  Seen seen;
  natten::cpu::parallel_region(num_threads, note, &seen);
  require(static_cast<int>(seen.threads.size()) == num_threads, "as many threads as asked for");
  for (int i = 0; i < num_threads; ++i) require(seen.threads.count(i) == 1, "every thread has a number of its own");
}

void test_exception(int num_threads) {
  std::atomic<int> finished{0};
  bool caught = false;
  try {
    natten::cpu::parallel_region(
        num_threads,
        [](void* context, int thread) {
          if (thread == 0) throw std::runtime_error("on purpose");
          ++*static_cast<std::atomic<int>*>(context);
        },
        &finished);
  } catch (std::runtime_error const& error) {
    caught = std::strcmp(error.what(), "on purpose") == 0;
  }
  require(caught, "the caller gets the exception");
  require(finished == num_threads - 1, "the other threads finish first");
}

void use_workspace(void*, int) {
  for (std::size_t bytes : {1, 1000, 100000, 10}) {
    void* memory = natten::cpu::thread_workspace(bytes);
    require(reinterpret_cast<std::uintptr_t>(memory) % 64 == 0, "the workspace is aligned");
    std::memset(memory, 1, bytes);
  }
  void* memory = natten::cpu::thread_workspace(100000);
  require(natten::cpu::thread_workspace(10) == memory, "the workspace is kept");
}

void test_all() {
  for (int num_threads : {1, 2, 3, 8}) {
    test_numbers(num_threads);
    test_exception(num_threads);
    natten::cpu::parallel_region(num_threads, use_workspace, nullptr);
  }
}

}  // namespace

int main() {
  test_all();
  natten::cpu::after_fork_in_child();
  test_all();
  std::puts("passed");
}
