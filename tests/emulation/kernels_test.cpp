// SPDX-License-Identifier: MIT
// Every kernel of an emulated library on random problems, against the naive CPU kernels in float64. A program, because
// ThreadSanitizer cannot be loaded into Python.
//
// Usage: kernels_test [problems of a kernel] [part of the names of the kernels to run] [number that problems start from]
#define NATTEN_CPU_ISA baseline

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "natten/cpu/naive.hpp"
#include "natten/cuda/library.hpp"
#include "problems.hpp"

namespace natten {
namespace {

using namespace cuda;

// A factorisation of `tokens` on the axes of a grid.
void choose_sides(int tokens, int rank, int (&sides)[kMaxRank]) {
  for (int& side : sides) side = 1;
  for (; tokens > 1; tokens /= 2) sides[random_int(kMaxRank - rank, kMaxRank - 1)] *= 2;
}

TileShapes random_tiles(KernelInfo const& kernel, int rank) {
  TileShapes shapes;
  choose_sides(kernel.own_tokens, rank, shapes.own);
  choose_sides(kernel.streamed_tokens, rank, shapes.streamed);
  return shapes;
}

double tolerance(KernelInfo const& kernel) {
  switch (kernel.dtype) {
    case DType::kFloat64:
      return 1e-12;
    case DType::kFloat32:
      return kernel.is_tf32 ? 2e-2 : 5e-5;
    case DType::kFloat16:
      return 2e-2;
    default:
      return 1e-1;
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Runs `call(message)`, of an entry point; throws what it reports.
template <class Call>
void must_succeed(Call const& call) {
  char message[1024] = "";
  if (call(message, int(sizeof(message))) != 0) throw std::runtime_error(message);
}

bool passes(KernelInfo const& kernel, int number) {
  generator.seed(number);
  // Several tiles each way, which have about 64 tokens.
  Problem const problem = random_problem(kernel.dtype, std::min(kernel.max_head_dim, 512), {300, 16, 7});
  Shapes const shapes(problem);
  Inputs const inputs(shapes), cotangents(shapes);
  Problem wide_problem = problem;
  wide_problem.dtype = DType::kFloat64;
  Inputs const wide_inputs = inputs.widened(), wide_cotangents = cotangents.widened();
  Results wide(Shapes(wide_problem), Array::Fill::kNan), results(shapes, Array::Fill::kNan);

  cpu::naive_forward<double>(forward_arguments(wide_problem, wide_inputs, wide));
  LaunchContext context;
  context.by_query = random_tiles(kernel, problem.rank);
  context.by_key = random_tiles(kernel, problem.rank);
  if (number % 4 >= 2) context.max_blocks = 3;  // which go on with other items
  std::unique_ptr<void, Free> workspace;
  if (kernel.op == Op::kForward) {
    ForwardArguments const f = forward_arguments(problem, inputs, results);
    must_succeed([&](char* message, int size) { return kernel.forward.run(&f, &context, message, size); });
  } else {
    results.output = wide.output.converted(problem.dtype);
    results.lse = wide.lse.converted(shapes.wide);
    cpu::naive_backward<double>(backward_arguments(wide_problem, wide_inputs, wide_cotangents, wide));
    BackwardArguments const b = backward_arguments(problem, inputs, cotangents, results);
    if (kernel.backward.workspace_bytes != nullptr) {
      constexpr std::int64_t kAlignment = 256;
      std::int64_t const bytes = kernel.backward.workspace_bytes(&b, &context);
      workspace.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
      std::memset(workspace.get(), 0xff, bytes);
      context.workspace = workspace.get();
    }
    must_succeed([&](char* message, int size) { return kernel.backward.run(&b, &context, message, size); });
  }

  bool all = true;
  compare_results(problem, results, wide, [&](char const* name, Array const& a, Array const& b) {
    if (kernel.op == Op::kForward && name != std::string("output") && name != std::string("lse")) return;
    double const difference = a.difference(b);
    if (difference <= tolerance(kernel)) return;
    std::printf("%s: problem %d: %s off by %g\n", kernel.name, number, name, difference);
    all = false;
  });
  return all;
}

}  // namespace
}  // namespace natten

int main(int count, char** arguments) {
  int const problems = count > 1 ? std::atoi(arguments[1]) : 4;
  std::string const wanted = count > 2 ? arguments[2] : "";
  int const first = count > 3 ? std::atoi(arguments[3]) : 0;
  natten::cuda::Library const& library = *NATTEN_CUDA_LIBRARY();
  bool all = true;
  for (int k = 0; k < library.num_kernels; ++k) {
    natten::cuda::KernelInfo const& kernel = library.kernels[k];
    if (std::string(kernel.name).find(wanted) == std::string::npos) continue;
    int passed = 0;
    for (int number = first; number < first + problems; ++number) {
      // Both ways that copies may land, in orders that differ from problem to problem.
      setenv("NATTEN_EMULATION_SEED", std::to_string(number).c_str(), true);
      setenv("NATTEN_EMULATION_COPIES", number % 2 ? "early" : "late", true);
      try {
        passed += natten::passes(kernel, number);
      } catch (std::exception const& error) {
        std::printf("%s: problem %d: %s\n", kernel.name, number, error.what());
      }
    }
    std::printf("%s: %d of %d problems agree\n", kernel.name, passed, problems);
    std::fflush(stdout);
    all = all && passed == problems;
  }
  return all ? 0 : 1;
}
