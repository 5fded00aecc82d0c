// SPDX-License-Identifier: MIT
#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace natten::emulation {

#if defined(__SANITIZE_THREAD__)
History History::create() {
  History history;
  history.owned_.reset(__tsan_create_fiber(0));
  history.thread_ = history.owned_.get();
  history.tokens_ = std::make_unique<char[]>(2);
  return history;
}
History History::of_current() {
  History history;
  history.thread_ = __tsan_get_current_fiber();
  return history;
}
void History::Destroy::operator()(void* thread) const { __tsan_destroy_fiber(thread); }
void History::switch_to() const { __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync); }
void History::record_copy(void const* source, void* destination, int bytes) const {
  History const self = of_current();
  switch_to();
  if (source != nullptr) __tsan_read_range(const_cast<void*>(source), bytes);
  __tsan_write_range(destination, bytes);
  self.switch_to();
}
void History::acquire_from_current() {
  History const self = of_current();
  release(&tokens_[0]);
  switch_to();
  acquire(&tokens_[0]);
  self.switch_to();
}
void History::release_to_current() {
  History const self = of_current();
  switch_to();
  release(&tokens_[1]);
  self.switch_to();
  acquire(&tokens_[1]);
}
void release(void* token) { __tsan_release(token); }
void acquire(void* token) { __tsan_acquire(token); }
#else
History History::create() { return {}; }
History History::of_current() { return {}; }
void History::Destroy::operator()(void*) const {}
void History::switch_to() const {}
void History::record_copy(void const*, void*, int) const {}
void History::acquire_from_current() {}
void History::release_to_current() {}
void release(void*) {}
void acquire(void*) {}
#endif

Stacks::Stacks(int count) : bytes_(count * (kBytes + kGuard)) {
  void* const memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i) mprotect((*this)[i] - kGuard, kGuard, PROT_NONE);
}

Stacks::~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, bytes_);
#endif
  munmap(memory_, bytes_);
}

#if defined(__x86_64__)
// Six registers and an address to return to: all that a call preserves (System V ABI).
extern "C" void natten_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl natten_emulation_switch
.hidden natten_emulation_switch
.type natten_emulation_switch, @function
natten_emulation_switch:
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
.size natten_emulation_switch, .-natten_emulation_switch
)");
#endif

void Fiber::prepare(char* stack, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = stack == nullptr ? 0 : Stacks::kBytes;
#if defined(__SANITIZE_ADDRESS__)
  if (stack != nullptr)
    __asan_unpoison_memory_region(stack, Stacks::kBytes);  // frames that were left, not returned from
  fake_stack_ = nullptr;
#endif
  if (stack == nullptr) history_ = History::of_current();
  else if (!history_) history_ = History::create();
  if (stack == nullptr) return;
#if defined(__x86_64__)
  constexpr int kRegisters = 6;
  auto* top = reinterpret_cast<std::uintptr_t*>(stack + Stacks::kBytes);
  *--top = 0;  // where a caller's address would be: an entry starts 8 bytes off a multiple of 16
  *--top = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 0; i < kRegisters; ++i) *--top = 0;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = Stacks::kBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& to, Fiber& from, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
  to.history_.switch_to();
#if defined(__x86_64__)
  natten_emulation_switch(&from.top_, to.top_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::arrive([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  void const* bottom;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &bytes);
  if (from.stack_ == nullptr) {  // the operating system's own stack is known from here on only
    from.stack_ = const_cast<void*>(bottom);
    from.stack_bytes_ = bytes;
  }
#endif
}

}  // namespace natten::emulation
