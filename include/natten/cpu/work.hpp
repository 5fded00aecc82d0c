// SPDX-License-Identifier: MIT
// What threads are given: work items, and memory to do them with.
#pragma once

#include <cstring>

#include "natten/cpu/parallel.hpp"
#include "natten/cpu/simd.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Runs body(index) for every index below `count`, on threads that take the next index when they are done with one.
template <class Body>
void for_each_item(std::int64_t count, int num_threads, Body const& body) {
  struct Context {
    std::int64_t next;
    std::int64_t count;
    Body const* body;
  } context{0, count, &body};
  int const threads = static_cast<int>(count < num_threads ? count : num_threads);
  if (threads <= 0) return;
  parallel_region(
      threads,
      [](void* pointer, int) {
        Context& c = *static_cast<Context*>(pointer);
        for (;;) {
          std::int64_t const i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
          if (i >= c.count) return finish_streams();
          (*c.body)(i);
        }
      },
      &context);
}

// Zeroed scratch memory that outlives an item. No standard container: its code would be compiled for this ISA and could be
// linked for all.
class ZeroedFloats {
 public:
  explicit ZeroedFloats(std::int64_t count)
      : data_(static_cast<float*>(take_scratch(static_cast<std::size_t>(count) * sizeof(float)))) {
    std::memset(data_, 0, static_cast<std::size_t>(count) * sizeof(float));
  }
  ~ZeroedFloats() { return_scratch(data_); }
  ZeroedFloats(ZeroedFloats const&) = delete;
  ZeroedFloats& operator=(ZeroedFloats const&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Cuts one piece of memory into aligned arrays; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* const result = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
