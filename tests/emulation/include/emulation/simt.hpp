// SPDX-License-Identifier: MIT
// Thread blocks on the CPU. A thread is a fiber; barriers and everything that a warp does together are places where
// fibers meet. Between two meetings one fiber runs alone, and a seed decides which: what CUDA leaves open is different
// from seed to seed, what it forbids is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace natten::emulation {

constexpr int kLanes = 32;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Grid {
  std::int64_t blocks;
  int threads;  // of a block
  int shared_bytes;
};

// Runs `body(state, shared)` once for each thread of each block, as these variables of the environment say:
//   NATTEN_EMULATION_SEED     order of threads (0)
//   NATTEN_EMULATION_COPIES   asynchronous copies land as "late" as they may, after poison, or "early", when issued (late)
//   NATTEN_EMULATION_THREADS  threads of the operating system that blocks are shared out to (one per CPU)
// Shared memory starts as bytes of 0xff: NaN in every format. Throws what a thread throws, and Error for a deadlock.
void launch(Grid const& grid, void (*body)(void const* state, char* shared), void const* state);

// The rest is called by the threads of a block.

void block_barrier();
void warp_barrier(unsigned mask);

// What lanes of a warp do together: all give values, meet, and take values from where others gave them. Places count
// units of `bytes` (2, 4 or 8), and a lane may give and take any.
void give(int bytes, int count, int const* places, void const* values);
void meet(char const* operation, unsigned mask);
void take(int bytes, int count, int const* places, void* values);

// `groups` products d = a b + c of float32 matrices, one after the other in the places of give: a (m, k), b (n, k) and
// c (m, n), columns after columns. `meet_and_multiply` leaves d where take reads from 0 on.
struct Product {
  int m, n, k, groups;

  constexpr int size() const { return m * k + n * k + m * n; }
  constexpr int begin_b() const { return m * k; }
  constexpr int begin_c() const { return m * k + n * k; }
};
void meet_and_multiply(Product const& product);

int lane();

// Throws unless these bytes lie in the block's shared memory, at a multiple of their number, and nothing is being copied
// there.
void check_shared(void const* address, int bytes, char const* operation);

// cp.async: the bytes, or zeros, are in shared memory once the thread has waited for the group that they belong to.
void copy_async(void const* source, void* destination, int bytes, bool is_present);
void commit_copies();
void wait_for_copies(int pending);  // until at most so many groups are under way; 0: also for copies not committed

}  // namespace natten::emulation
