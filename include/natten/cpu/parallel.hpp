// SPDX-License-Identifier: MIT
// Threads and scratch memory of the CPU kernels. Declarations only, no templates: this header is included by files
// compiled for newer ISAs.
#pragma once

#include <cstddef>

namespace natten::cpu {

// Runs body(context, thread) on `num_threads` threads, thread = 0 .. num_threads - 1, the caller among them, and waits.
// Uses the OpenMP pool that the process already has (torch's), without linking one. An exception thrown by a body is
// rethrown here after all threads are done. Regions are not nested.
using ParallelBody = void (*)(void* context, int thread);
void parallel_region(int num_threads, ParallelBody body, void* context);

// Scratch memory, 64-byte aligned, from blocks that are kept from call to call (fresh pages would cost more than small
// problems take). Throws std::bad_alloc.
void* take_scratch(std::size_t bytes);
void return_scratch(void* memory);

// The same for the calling thread of a region: valid until its next call, or else the end of the region.
void* thread_workspace(std::size_t bytes);

}  // namespace natten::cpu
