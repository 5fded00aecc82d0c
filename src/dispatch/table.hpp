// SPDX-License-Identifier: MIT
// What was compiled in. Both lists are generated from src/codegen/table.py.
#pragma once

#include <vector>

#include "natten/arguments.hpp"

namespace natten {

enum class Op { kForward, kBackward };

struct Isa {
  char const* id;
  bool runs_here;  // on this CPU, under this operating system
};

struct Kernel {
  char const* name;
  Op op;
  char const* backend;
  char const* isa;
  DType dtype;
  int max_head_dim;
  void (*forward)(ForwardArguments const&);    // null unless op is kForward
  void (*backward)(BackwardArguments const&);  // null unless op is kBackward
};

// Without the baseline, which runs everywhere; best first.
std::vector<Isa> const& isas();

// In order of preference.
std::vector<Kernel> const& kernels();

}  // namespace natten
