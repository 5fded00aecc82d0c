// SPDX-License-Identifier: MIT
#pragma once

namespace natten::cpu {

// Says that this process is a forked child. The threads of its parent's OpenMP pool did not survive, and a region would
// wait for them for ever: later regions start threads of their own.
void after_fork_in_child();

}  // namespace natten::cpu
