// SPDX-License-Identifier: MIT
// Computations with a stack of their own, that hand the processor to each other.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace natten::emulation {

#if defined(__SANITIZE_THREAD__)
constexpr bool kFindsRaces = true;
#else
constexpr bool kFindsRaces = false;
#endif

// What ThreadSanitizer knows of a thread: which accesses come before which. Nothing at all in other builds.
class History {
 public:
  History() = default;          // none
  static History create();      // of a thread that begins after what the running one has done
  static History of_current();  // of the running one

  explicit operator bool() const { return thread_ != nullptr; }
  void switch_to() const;  // orders nothing

  // An asynchronous access, and its order after and before what the running thread does.
  void record_copy(void const* source, void* destination, int bytes) const;
  void acquire_from_current();
  void release_to_current();

 private:
  struct Destroy {
    void operator()(void* thread) const;
  };
  std::unique_ptr<void, Destroy> owned_;
  void* thread_ = nullptr;
  std::unique_ptr<char[]> tokens_;  // addresses that stand for the order
};

// Tells ThreadSanitizer that what comes before a release is visible after an acquire of the same address.
void release(void* token);
void acquire(void* token);

// Stacks of `kBytes` each, in one mapping; touching the page below one is a fault.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kBytes = 512 << 10;  // frames have red zones around every variable
#else
  // With 32 KB, ThreadSanitizer runs out of it while it writes a report.
  static constexpr std::size_t kBytes = 128 << 10;
#endif

  explicit Stacks(int count);
  ~Stacks();
  Stacks(Stacks const&) = delete;
  Stacks& operator=(Stacks const&) = delete;

  char* operator[](int i) const { return memory_ + i * (kBytes + kGuard) + kGuard; }

 private:
  static constexpr std::size_t kGuard = 4096;

  char* memory_;
  std::size_t bytes_;
};

// One that waits. The thread of the operating system that runs fibers is one itself: default-constructed.
class Fiber {
 public:
  Fiber() = default;
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;

  // The next switch to this fiber calls `entry`, which never returns. Without a stack: what is running now.
  void prepare(char* stack, void (*entry)());

  // Suspends `from`, which is running; returns when somebody switches to it. A fiber that `ends` is never resumed.
  static void switch_to(Fiber& to, Fiber& from, bool ends);

  // First thing in an entry.
  static void arrive(Fiber& self, Fiber& from);

 private:
#if defined(__x86_64__)
  void* top_ = nullptr;  // of the stack, below the registers that a function must preserve
#else
  ucontext_t context_;
#endif
  void* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  History history_;
};

}  // namespace natten::emulation
