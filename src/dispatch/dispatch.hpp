// SPDX-License-Identifier: MIT
// Which kernels can run a problem, which one does, and why the others cannot.
#pragma once

#include <string>
#include <vector>

#include "dispatch/table.hpp"

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

// Why `kernel` cannot run `problem` when `isa` is in force, as sentences; empty: it can.
std::vector<std::string> reasons(Kernel const& kernel, Problem const& problem, std::string const& isa);

// The kernels of an op and backend ("auto": all), in order of preference.
std::vector<Candidate> candidates(Problem const& problem, Op op, std::string const& backend, std::string const& isa);

// By exact name. Throws std::invalid_argument if there is none, or if it cannot run the problem.
Kernel const& find_kernel(std::string const& name, Op op, Problem const& problem);

}  // namespace natten
