// SPDX-License-Identifier: MIT
#pragma once

namespace natten::cpu {

// Around a fork. The threads of the parent's OpenMP pool do not survive in the child, and a region would wait for them for
// ever: its regions start threads of their own. Nor does it have its parent's scratch memory. In the child, the last one may
// be called alone.
void before_fork();
void after_fork_in_parent();
void after_fork_in_child();

}  // namespace natten::cpu
