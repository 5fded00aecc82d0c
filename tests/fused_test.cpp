// SPDX-License-Identifier: MIT
// The SIMD kernels of this machine, fused and unfused, against the naive ones, on random problems. For machines without
// torch, such as the emulated one that `make aarch64` runs it on.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "dispatch/dispatch.hpp"
#include "dispatch/names.hpp"
#include "natten/tiling.hpp"
#include "problems.hpp"

namespace natten {

namespace {

Kernel const& kernel_of(std::string const& backend, Op op, Problem const& problem, std::string const& isa) {
  for (Candidate const& candidate : candidates(problem, op, backend, {0, false, isa})) {
    if (candidate.reasons.empty()) return *candidate.kernel;
  }
  throw std::runtime_error("no kernel of " + backend + " for " + isa);
}

int slots_of(Problem const& p) { return p.axes[0].kernel_size * p.axes[1].kernel_size * p.axes[2].kernel_size; }

void run(std::string const& backend, std::string const& isa, Problem const& p, Inputs const& inputs,
         Inputs const& cotangents, Results& results) {
  ForwardArguments f = forward_arguments(p, inputs, results);
  f.num_threads = 2;
  kernel_of(backend, Op::kForward, p, isa).forward(f);
  BackwardArguments b = backward_arguments(p, inputs, cotangents, results);
  b.num_threads = f.num_threads;
  kernel_of(backend, Op::kBackward, p, isa).backward(b);
}

// What an unfused op computes.
Array run_unfused(std::string const& backend, std::string const& isa, Problem const& p, Op op, Inputs const& inputs,
                  Array const& weights) {
  Shapes const shapes(p);
  auto const result_of = [&] {
    if (op == Op::kQk) return shapes.of_query(slots_of(p), Array::Fill::kNan);
    if (op == Op::kAv) return shapes.of_query(p.head_dim, Array::Fill::kNan);
    if (op == Op::kAvTransposed) return shapes.of_key(p.head_dim, Array::Fill::kNan);
    return shapes.of_bias(Array::Fill::kNan);
  };
  Array result = result_of();
  UnfusedArguments a;
  a.problem = p;
  a.query = op == Op::kAv ? result.ref() : inputs.query.ref();
  a.key = op == Op::kAvTransposed ? result.ref() : inputs.key.ref();
  a.weights = op == Op::kQk ? result.ref() : weights.ref();
  if (p.has_rpb && op == Op::kQk) a.rpb = inputs.rpb.ref().data;
  if (op == Op::kRpbGradient) a.d_rpb = result.ref().data;
  a.unused = -1;
  a.num_threads = 2;
  kernel_of(backend, op, p, isa).unfused(a);
  return result;
}

bool agree(Problem const& p, std::string const& isa) {
  Shapes const shapes(p);
  Inputs const inputs(shapes), cotangents(shapes);
  Results fused(shapes, Array::Fill::kNan), naive(shapes, Array::Fill::kNan);
  run("fna", isa, p, inputs, cotangents, fused);
  run("naive", isa, p, inputs, cotangents, naive);

  // Both round once to the storage type; the fused kernels may round weights to it as well.
  double const tolerance = p.dtype == DType::kFloat32 ? 1e-4 : p.dtype == DType::kFloat16 ? 2e-2 : 1e-1;
  bool all = true;
  auto const compare = [&](char const* name, Array const& a, Array const& b) {
    double const difference = a.difference(b);
    if (difference <= tolerance) return;
    std::fprintf(stderr, "%s: %s off by %g\n", dtype_name(p.dtype).c_str(), name, difference);
    all = false;
  };
  compare_results(p, fused, naive, compare);
  Array const weights = shapes.of_query(slots_of(p), Array::Fill::kRandom);
  for (Op op : {Op::kQk, Op::kAv, Op::kAvTransposed, Op::kRpbGradient}) {
    compare(op_name(op).c_str(), run_unfused("gemm", isa, p, op, inputs, weights),
            run_unfused("naive", isa, p, op, inputs, weights));
  }
  return all;
}

}  // namespace

}  // namespace natten

int main() {
  using natten::DType;
  bool all = true;
  for (std::string const& isa : natten::cpu_isas()) {
    int count = 0, passed = 0;
    for (int i = 0; i < 60; ++i) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        ++count;
        natten::Problem problem = natten::random_problem(dtype);
        check(problem);
        choose_tiles(problem);
        passed += natten::agree(problem, isa);
      }
    }
    std::printf("%s: %d of %d problems agree\n", isa.c_str(), passed, count);
    all = all && passed == count;
  }
  return all ? 0 : 1;
}
