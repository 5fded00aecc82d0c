// SPDX-License-Identifier: MIT
// The kernels there are. Both lists of this library are generated from src/codegen/table.py.
#pragma once

#include <vector>

#include "natten/arguments.hpp"

namespace natten {

struct Isa {
  char const* id;
  bool runs_here;  // on this CPU, under this operating system
};

// What dispatch asks of a CUDA kernel besides; `is_cuda` is false for the CPU's.
struct CudaTraits {
  bool is_cuda = false;
  bool is_emulated = false;  // its code runs on the CPU: for tests, by name only
  bool is_tf32 = false;
  int min_arch = 0, max_arch = 0;  // that it is chosen on
  int own_tokens = 0, streamed_tokens = 0;
};

struct Kernel {
  char const* name;
  Op op;
  char const* backend;
  char const* isa;  // or the policy of a CUDA kernel
  DType dtype;
  int max_head_dim;
  // One of them is the entry point, the others are null; CUDA's are in libraries (libraries.hpp).
  void (*forward)(ForwardArguments const&);
  void (*backward)(BackwardArguments const&);
  void (*unfused)(UnfusedArguments const&);
  CudaTraits cuda;
};

// Without the baseline, which runs everywhere; best first.
std::vector<Isa> const& isas();

// In order of preference.
std::vector<Kernel> const& own_kernels();

}  // namespace natten
