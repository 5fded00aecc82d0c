// SPDX-License-Identifier: MIT
#pragma once

#include "natten/arguments.hpp"

namespace natten::cpu {

// Provides the pages of what a call is about to compute: all of it is written. Fresh pages of the usual size take longer
// than a small window does, as the kernel that touches them is stopped for each.
void provide_pages(ForwardArguments const& arguments, Op op);
void provide_pages(BackwardArguments const& arguments, Op op);
void provide_pages(UnfusedArguments const& arguments, Op op);

}  // namespace natten::cpu
