// SPDX-License-Identifier: MIT
// Which kernels can run a problem, which one does, and why the others cannot.
#pragma once

#include <string>
#include <vector>

#include "dispatch/libraries.hpp"

namespace natten {

// Throw std::invalid_argument for what no kernel may be called with: it would read out of bounds. `check_numbers` looks at
// no box.
void check_numbers(Axis const& axis, int index);
void check(Axis const& axis, int index);
void check(Problem const& problem);

struct Candidate {
  Kernel const* kernel;
  std::vector<std::string> reasons;  // why it cannot run; empty: it can
};

// ISAs that this CPU runs, best first.
std::vector<std::string> cpu_isas();

// The ISA that is meant by `wanted` ("": the best). Throws std::invalid_argument if this CPU does not run it.
std::string resolve_isa(std::string const& wanted);

// Where a problem's tensors are.
struct Device {
  int arch = 0;              // 86 for SM86; 0: the CPU
  bool is_pretended = false; // asked about only: code need not be there
  std::string isa;           // of the CPU, in force
};

// Whether any CUDA kernel could be launched on GPUs of this architecture.
bool has_code_for(int arch);

// Why `kernel` cannot run `problem` on `device`, as sentences; empty: it can. A kernel that was named may be of another
// ISA than the one in force, and of an older architecture than it would be chosen on.
std::vector<std::string> reasons(Kernel const& kernel, Problem const& problem, Device const& device, bool is_named);

// The kernels of an op, device and backend, in order of preference. The backend may be "auto", for all of them but the
// emulated, or "fna:Sm80": those of one policy or ISA, on whatever device; or the name of one kernel.
std::vector<Candidate> candidates(Problem const& problem, Op op, std::string const& backend, Device const& device);

// By exact name. Throws std::invalid_argument if there is none, or if it cannot run the problem.
Kernel const& find_kernel(std::string const& name, Op op, Problem const& problem, Device const& device);

// How many of `num_threads` threads a kernel of the CPU is to run on: no more than have enough to do. A region of several threads
// costs microseconds, and where other processes are busy, milliseconds.
int useful_threads(Kernel const& kernel, Problem const& problem, int num_threads);

// What is enough, in multiplications; returns what it was. For tests: with 0, the smallest problem runs on all threads.
double set_least_work(double multiplications);

}  // namespace natten
