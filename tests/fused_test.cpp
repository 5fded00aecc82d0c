// SPDX-License-Identifier: MIT
// The SIMD kernels of this machine, fused and unfused, against the naive ones, on random problems. For machines without
// torch, such as the emulated one that `make aarch64` runs it on.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

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
Array run_unfused(std::string const& backend, std::string const& isa, Problem const& p, Op op, UnfusedTensors tensors) {
  UnfusedTensors nothing(Shapes(p), Array::Fill::kNan);
  std::swap(tensors.result_of(op), nothing.result_of(op));
  UnfusedArguments a = unfused_arguments(p, op, tensors, /*unused=*/-1);
  a.num_threads = 2;
  kernel_of(backend, op, p, isa).unfused(a);
  return std::move(tensors.result_of(op));
}

// Small integers, those of each key times a power of two of its own: in one row there are logits of all magnitudes, which are exact
// in any order of summation.
void mix_magnitudes(Problem const& p, Inputs& inputs) {
  auto const integer = [](double x) { return std::round(2 * x); };
  auto const exponent = [&](std::size_t row) {
    constexpr int kExponents[] = {-3, 0, 3, 5, 2, 8, 27, 34, 64, 100};
    return kExponents[row * 2654435761u / 1024 % (p.dtype == DType::kFloat16 ? 5 : 10)];
  };
  auto const spread = [&](double x, std::size_t row) { return std::ldexp(integer(x), exponent(row)); };
  inputs.query.change([&](double x, std::size_t) { return integer(x); });
  inputs.key.change(spread);
  if (p.additional_keys) inputs.additional_keys.change(spread);
}

// `is_mixed`: logits of all magnitudes, of which the gradients of queries and keys are not compared: they are what is left of large
// numbers.
bool agree(Problem const& p, std::string const& isa, bool is_mixed = false) {
  Shapes const shapes(p);
  Inputs inputs(shapes), cotangents(shapes);
  if (is_mixed) mix_magnitudes(p, inputs);
  Results fused(shapes, Array::Fill::kNan), naive(shapes, Array::Fill::kNan);
  run("fna", isa, p, inputs, cotangents, fused);
  run("naive", isa, p, inputs, cotangents, naive);

  // Both round once to the storage type; the fused kernels may round weights to it as well.
  double const tolerance = p.dtype == DType::kFloat32 ? 1e-4 : p.dtype == DType::kFloat16 ? 2e-2 : 1e-1;
  bool all = true;
  auto const compare = [&](char const* name, Array const& a, Array const& b) {
    std::string const what = name;
    if (is_mixed && (what == "d_query" || what == "d_key" || what == "d_additional_keys" || what == "d_rpb")) return;
    double const difference = a.difference(b);
    if (difference <= tolerance) return;
    std::fprintf(stderr, "%s: %s off by %g\n", dtype_name(p.dtype).c_str(), name, difference);
    all = false;
  };
  compare_results(p, fused, naive, compare);
  if (is_mixed) return all;
  // The bias gradient is a sum of up to 30,000 numbers: float32, one after the other, would be off by 1e-4 itself.
  UnfusedTensors const tensors(shapes, Array::Fill::kRandom);
  Problem wide = p;
  wide.dtype = DType::kFloat64;
  for (Op op : {Op::kQk, Op::kAv, Op::kAvTransposed, Op::kRpbGradient}) {
    compare(op_name(op).c_str(), run_unfused("gemm", isa, p, op, tensors),
            run_unfused("naive", isa, wide, op, tensors.widened()));
  }
  return all;
}

}  // namespace

}  // namespace natten

int main() {
  using natten::DType;
  auto const planned = [](natten::Problem problem) {
    check(problem);
    choose_tiles(problem);
    return problem;
  };
  bool all = true;
  for (std::string const& isa : natten::cpu_isas()) {
    int count = 0, passed = 0;
    for (int i = 0; i < 60; ++i) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        ++count;
        passed += natten::agree(planned(natten::random_problem(dtype)), isa);
      }
    }
    for (int i = 0; i < 30; ++i) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        natten::Problem problem = planned(natten::random_problem(dtype));
        problem.scale = i % 3 == 0 ? -0.5 : 0.25;
        ++count;
        passed += natten::agree(problem, isa, /*is_mixed=*/true);
      }
    }
    // Longer windows and lines, whose tiles of 16 queries slide.
    for (int i = 0; i < 15; ++i) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        natten::Problem problem;
        do {
          problem = planned(natten::random_problem(dtype, 20, {200, 16, 3}, {40, 10, 4}));
        } while (!problem.tiles.queries_slide);
        ++count;
        passed += natten::agree(problem, isa);
      }
    }
    std::printf("%s: %d of %d problems agree\n", isa.c_str(), passed, count);
    all = all && passed == count;
  }
  return all ? 0 : 1;
}
