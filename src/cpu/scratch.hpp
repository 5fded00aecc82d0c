// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

namespace natten::cpu {

// A block that is larger is not kept: twice what kernels take for all but the longest lines and the largest bias tables.
constexpr std::size_t kKeptScratchBytes = 16 << 20;

// Ends the validity of the calling thread's workspace.
void return_thread_workspace();

// Returns to the system what no kernel is using, and the rest when it is done. Returns how many bytes of scratch memory the
// process had.
std::size_t release_scratch();

// Around a fork: nobody else takes or returns memory meanwhile. The child forgets all of its parent's, which the threads that
// had it would never return.
void lock_scratch();
void unlock_scratch();
void forget_scratch();

}  // namespace natten::cpu
