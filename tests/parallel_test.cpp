// SPDX-License-Identifier: MIT
// Compiled and run by test_core.py, together with src/cpu/{parallel,scratch}.cpp: what Python cannot see of them.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>

#include "cpu/fork.hpp"
#include "cpu/scratch.hpp"
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

void test_scratch() {
  using namespace natten::cpu;
  release_scratch();
  void* const first = take_scratch(1000);
  void* const second = take_scratch(1000);
  require(first != second, "two who take memory at the same time have different memory");
  std::memset(first, 1, 1000);
  return_scratch(first);
  return_scratch(second);
  void* const third = take_scratch(900);
  void* const fourth = take_scratch(900);
  require((third == first && fourth == second) || (third == second && fourth == first), "memory is kept");
  std::size_t const in_use = release_scratch();
  require(in_use > 0 && release_scratch() == in_use, "what is in use is not released");
  return_scratch(first);
  return_scratch(second);
  require(release_scratch() == 0, "but when it no longer is");

  void* const small = take_scratch(1);
  return_scratch(small);
  void* const large = take_scratch(kKeptScratchBytes + 1);
  std::memset(large, 1, kKeptScratchBytes + 1);
  return_scratch(large);
  require(release_scratch() == 0, "what is too large is not kept, and what was too small is not either");

  bool thrown = false;
  try {
    take_scratch(~std::size_t{0} / 4);
  } catch (std::bad_alloc const&) {
    thrown = true;
  }
  require(thrown && release_scratch() == 0, "too much is refused");
}

void* of_thread[8];

// The memory of threads is kept from region to region.
void test_kept_workspaces(int num_threads) {
  natten::cpu::release_scratch();
  for (int i = 0; i < 3; ++i) {
    natten::cpu::parallel_region(
        num_threads,
        [](void*, int thread) { std::memset(of_thread[thread] = natten::cpu::thread_workspace(5000), thread, 5000); },
        nullptr);
    for (int a = 0; a < num_threads; ++a) {
      std::uintptr_t const address = reinterpret_cast<std::uintptr_t>(of_thread[a]);
      require(address != 0 && address % 64 == 0, "every thread has memory");
    }
  }
  std::size_t const bytes = natten::cpu::release_scratch();
  constexpr std::size_t kLargestPage = 64 << 10;
  require(bytes > 0 && bytes <= kLargestPage * static_cast<std::size_t>(num_threads), "no more than threads have used");
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
  test_scratch();
  for (int num_threads : {1, 2, 3, 8}) {
    test_numbers(num_threads);
    test_exception(num_threads);
    natten::cpu::parallel_region(num_threads, use_workspace, nullptr);
    test_kept_workspaces(num_threads);
  }
}

}  // namespace

int main() {
  test_all();
  natten::cpu::before_fork();
  natten::cpu::after_fork_in_parent();
  natten::cpu::return_scratch(natten::cpu::take_scratch(100));
  natten::cpu::before_fork();
  natten::cpu::after_fork_in_child();
  require(natten::cpu::release_scratch() == 0, "a child has nothing of its parent's");
  test_all();
  std::puts("passed");
}
