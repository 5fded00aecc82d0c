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
#include <utility>

#include "natten/cpu/naive_unfused.hpp"
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
      return kernel.is_tf32 ? 1e-2 : 5e-5;
    case DType::kFloat16:
      return 5e-3;
    default:
      return 4e-2;
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

class Report {
 public:
  Report(KernelInfo const& kernel, int number) : kernel_(kernel), number_(number) {}

  void compare(char const* name, Array const& result, Array const& expected) {
    double const difference = result.difference(expected);
    if (difference <= tolerance(kernel_)) return;
    std::printf("%s: problem %d: %s off by %g\n", kernel_.name, number_, name, difference);
    passed_ = false;
  }
  bool passed() const { return passed_; }

 private:
  KernelInfo const& kernel_;
  int number_;
  bool passed_ = true;
};

// Runs the kernel by its entry point.
template <class Arguments>
void run(cuda::Entry<Arguments> const& entry, Arguments const& arguments, LaunchContext context) {
  std::unique_ptr<void, Free> workspace;
  if (entry.workspace_bytes != nullptr) {
    constexpr std::int64_t kAlignment = 256;
    std::int64_t const bytes = entry.workspace_bytes(&arguments, &context);
    workspace.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    std::memset(workspace.get(), 0xff, bytes);
    context.workspace = workspace.get();
  }
  char message[1024] = "";
  if (entry.run(&arguments, &context, message, int(sizeof(message))) != 0) throw std::runtime_error(message);
}

void check_fused(KernelInfo const& kernel, Problem const& problem, LaunchContext const& context, Report& report) {
  Shapes const shapes(problem);
  Inputs const inputs(shapes), cotangents(shapes);
  Problem wide_problem = problem;
  wide_problem.dtype = DType::kFloat64;
  Inputs const wide_inputs = inputs.widened(), wide_cotangents = cotangents.widened();
  Results wide(Shapes(wide_problem), Array::Fill::kNan), results(shapes, Array::Fill::kNan);

  cpu::naive_forward<double>(forward_arguments(wide_problem, wide_inputs, wide));
  if (kernel.op == Op::kForward) {
    run(kernel.forward, forward_arguments(problem, inputs, results), context);
  } else {
    // Both get the rounded output: its error in delta grows with the head dim, and is not the kernel's.
    results.output = wide.output.converted(problem.dtype);
    results.lse = wide.lse.converted(shapes.wide);
    wide.output = results.output.converted(DType::kFloat64);
    wide.lse = results.lse.converted(DType::kFloat64);
    cpu::naive_backward<double>(backward_arguments(wide_problem, wide_inputs, wide_cotangents, wide));
    run(kernel.backward, backward_arguments(problem, inputs, cotangents, results), context);
  }
  compare_results(problem, results, wide, [&](char const* name, Array const& a, Array const& b) {
    if (kernel.op == Op::kForward && name != std::string("output") && name != std::string("lse")) return;
    report.compare(name, a, b);
  });
}

void run_on_cpu(Op op, UnfusedArguments const& arguments) {
  switch (op) {
    case Op::kQk:
      return cpu::naive_qk<double>(arguments);
    case Op::kAv:
      return cpu::naive_av<double>(arguments);
    case Op::kAvTransposed:
      return cpu::naive_av_transposed<double>(arguments);
    default:
      return cpu::naive_rpb_gradient<double>(arguments);
  }
}

void check_unfused(KernelInfo const& kernel, Problem const& problem, LaunchContext const& context, Report& report) {
  Shapes const shapes(problem);
  Problem wide_problem = problem;
  wide_problem.dtype = DType::kFloat64;
  UnfusedTensors tensors(shapes, Array::Fill::kRandom);
  // Slots without a key hold NaN: nothing may read them.
  UnfusedTensors marks = tensors.widened();
  cpu::naive_qk<double>(unfused_arguments(wide_problem, Op::kQk, marks, NAN));
  tensors.weights.poison(marks.weights);
  UnfusedTensors wide = tensors.widened();

  UnfusedTensors nothing(shapes, Array::Fill::kNan);
  std::swap(tensors.result_of(kernel.op), nothing.result_of(kernel.op));
  double const unused = random_int(0, 1) ? -INFINITY : 0;
  run_on_cpu(kernel.op, unfused_arguments(wide_problem, kernel.op, wide, unused));
  run(kernel.unfused, unfused_arguments(problem, kernel.op, tensors, unused), context);
  report.compare("result", tensors.result_of(kernel.op), wide.result_of(kernel.op));
}

bool passes(KernelInfo const& kernel, int number) {
  generator.seed(number);
  // Several tiles each way, which have about 64 tokens.
  Problem const problem = random_problem(kernel.dtype, std::min(kernel.max_head_dim, 512), {300, 16, 7});
  LaunchContext context;
  context.by_query = random_tiles(kernel, problem.rank);
  context.by_key = random_tiles(kernel, problem.rank);
  if (number % 4 >= 2) context.max_blocks = 3;  // which go on with other items
  Report report(kernel, number);
  bool const is_fused = kernel.op == Op::kForward || kernel.op == Op::kBackward;
  (is_fused ? check_fused : check_unfused)(kernel, problem, context, report);
  return report.passed();
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
