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
  void require_finite(char const* name, Array const& result) {
    if (std::isfinite(result.difference(result))) return;
    std::printf("%s: problem %d: %s is not finite\n", kernel_.name, number_, name);
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

// What problems are about, besides those that are random altogether.
enum class Kind {
  kRandom,
  kUnattended,  // two of three dilation groups of the keys have no queries
  kLarge,  // logits of 1e9 and more: half a unit in the last place of the largest is more than exp2 has exponents
  kMasked,  // logits of -2.5e6 beside ordinary ones, as a mask in a channel of query and key makes them
};
constexpr int kRandomProblems = 6;  // then one of each other kind, and so on

Kind kind_of(int number) {
  constexpr int kKinds = 4;
  int const place = number % (kRandomProblems + kKinds - 1);
  return place < kRandomProblems ? Kind::kRandom : static_cast<Kind>(place - kRandomProblems + 1);
}

Problem make_problem(KernelInfo const& kernel, Kind kind) {
  // Several tiles each way, which have about 64 tokens.
  if (kind == Kind::kRandom) return random_problem(kernel.dtype, std::min(kernel.max_head_dim, 512), {300, 16, 7});
  Problem problem = random_problem(kernel.dtype, 32);
  problem.head_dim = problem.head_dim_value = 32;
  problem.additional_keys = 0;
  if (kind == Kind::kUnattended) {
    problem.rank = 2;
    for (int a = 0; a < kMaxRank; ++a) problem.axes[a] = Axis{};
    for (int a : {1, 2}) {
      Axis& axis = problem.axes[a];
      axis.boundary = Boundary::kValid;
      axis.extent = axis.query_extent = axis.key_extent = 7;
      axis.kernel_size = a == 1 ? 3 : 2;
      axis.dilation = a == 1 ? 3 : 1;
      Interval const queries = axis.valid_queries();
      axis.query_origin = queries.begin;
      axis.query_extent = queries.size();
    }
    return problem;
  }
  problem.has_rpb = false;  // whose gradient would be a difference of large numbers
  problem.scale = kind == Kind::kLarge ? 0.3f * float(std::int64_t{1} << 32) : 0.3f;
  return problem;
}

// All products are exact, and no two logits of a row are close: float32 has the softmax that float64 has.
void make_large(Inputs& inputs, Problem const& problem, Kind kind) {
  if (kind == Kind::kLarge) {
    auto const number = [&](int const(&place)[kMaxRank]) {
      return (place[0] * problem.axes[1].extent + place[1]) * problem.axes[2].extent + place[2];
    };
    inputs.query.fill([](int const(&)[kMaxRank], int column) { return column == 0 ? 1.0 : column == 1 ? 64.0 : 0.0; });
    inputs.key.fill([&](int const(&place)[kMaxRank], int column) -> double {
      return column == 0 ? number(place) % 64 : column == 1 ? number(place) / 64 : 0;
    });
  } else {
    constexpr double kLarge = 32768, kQuery = 256;
    inputs.query.fill([&](int const(&)[kMaxRank], int column) { return column == 0 ? kQuery : random_int(-3, 3); });
    inputs.key.fill([&](int const(&place)[kMaxRank], int column) -> double {
      if (column > 0) return random_int(-3, 3);
      return place[2] / problem.axes[2].dilation % 2 == 1 ? -kLarge : 0;
    });
  }
}

void check_fused(KernelInfo const& kernel, Problem const& problem, Kind kind, LaunchContext const& context,
                 Report& report) {
  Shapes const shapes(problem);
  Inputs inputs(shapes);
  Inputs const cotangents(shapes);
  bool const is_large = kind == Kind::kLarge || kind == Kind::kMasked;
  if (is_large) make_large(inputs, problem, kind);
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
    cpu::naive_backward<double>(backward_arguments(wide_problem, wide_inputs, wide_cotangents, wide));
    run(kernel.backward, backward_arguments(problem, inputs, cotangents, results), context);
  }
  compare_results(problem, results, wide, [&](char const* name, Array const& a, Array const& b) {
    std::string const what = name;
    if (kernel.op == Op::kForward && what != "output" && what != "lse") return;
    if ((kind == Kind::kLarge && what == "d_query") || (is_large && what == "d_key")) {
      report.require_finite(name, a);  // rounding errors, times a large scale or query
    } else {
      report.compare(name, a, b);
    }
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
  Kind const kind = kind_of(number);
  Problem const problem = make_problem(kernel, kind);
  LaunchContext context;
  context.by_query = random_tiles(kernel, problem.rank);
  context.by_key = random_tiles(kernel, problem.rank);
  if (number % 4 >= 2 || kind == Kind::kUnattended) context.max_blocks = 3;  // which go on with other items
  Report report(kernel, number);
  bool const is_fused = kernel.op == Op::kForward || kernel.op == Op::kBackward;
  if (is_fused) check_fused(kernel, problem, kind, context, report);
  else check_unfused(kernel, problem, context, report);
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
