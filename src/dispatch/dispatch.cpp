// SPDX-License-Identifier: MIT
#include "dispatch/dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "dispatch/names.hpp"
#include "dispatch/planning.hpp"

namespace natten {

namespace {

constexpr char const* kBaseline = "baseline";

bool runs_here(std::string const& isa) {
  if (isa == kBaseline) return true;
  return std::any_of(isas().begin(), isas().end(), [&](Isa const& row) { return row.id == isa && row.runs_here; });
}

void require(bool condition, std::string const& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::string with_value(std::string const& name, std::int64_t value) { return name + " = " + std::to_string(value); }

std::string indexed(char const* field, int index, int value) {
  return with_value(std::string(field) + "[" + std::to_string(index) + "]", value);
}

}  // namespace

void check_numbers(Axis const& axis, int index) {
  auto const name = [&](char const* field, int value) { return indexed(field, index, value); };
  require(axis.extent >= 0, name("extent", axis.extent) + " must not be negative");
  require(axis.kernel_size >= 1, name("kernel_size", axis.kernel_size) + " must be at least 1");
  require(axis.dilation >= 1, name("dilation", axis.dilation) + " must be at least 1");
  require(1 <= axis.stride && axis.stride <= axis.kernel_size,
          name("stride", axis.stride) + " must lie between 1 and " + name("kernel_size", axis.kernel_size));
  // Positions are int: the grid, a window beyond its ends and an offset must not overflow together.
  constexpr std::int64_t kLargest = 1 << 29;
  std::int64_t const reach = std::int64_t{axis.kernel_size} * axis.dilation;
  require(axis.extent <= kLargest, name("extent", axis.extent) + " exceeds 2^29");
  require(reach <= kLargest,
          name("kernel_size", axis.kernel_size) + " times " + name("dilation", axis.dilation) + " exceeds 2^29");
  require(-kLargest <= axis.offset && axis.offset <= kLargest, name("offset", axis.offset) + " is beyond 2^29");

  require(axis.boundary != Boundary::kShift || axis.extent == 0 || reach <= axis.extent,
          name("kernel_size", axis.kernel_size) + " times " + name("dilation", axis.dilation) + " exceeds " +
              name("extent", axis.extent) + "; use a smaller window, or another boundary than 'shift'");
  require(axis.boundary != Boundary::kValid || (axis.stride == 1 && !axis.is_causal),
          "boundary 'valid' on axis " + std::to_string(index) + " wants stride 1 and no causality");
}

void check(Axis const& axis, int index) {
  check_numbers(axis, index);
  auto const check_box = [&](char const* field, int origin, int size) {
    require(origin >= 0 && size >= 0 && size <= axis.extent && origin <= axis.extent - size,
            indexed(field, index, origin) + " and " + std::to_string(size) + " tokens from there leave the grid, of " +
                indexed("extent", index, axis.extent));
  };
  check_box("query_origin", axis.query_origin, axis.query_extent);
  check_box("key_origin", axis.key_origin, axis.key_extent);
  // A window as wide as the grid means "all keys there are": dense attention with more queries than keys.
  if (axis.kernel_size == axis.extent) return;
  for_each_kind_of_group(axis, [&](Group const& group, int) {
    if (group.keys_suffice()) return;
    int const first = group.grid_window(group.queries.begin).begin * axis.dilation + group.index;
    int const last = (group.grid_window(group.queries.end - 1).end - 1) * axis.dilation + group.index;
    throw std::invalid_argument("on axis " + std::to_string(index) + " the windows of the queries reach from token " +
                                std::to_string(first) + " to token " + std::to_string(last) +
                                " of the grid, but the keys hold only tokens " + std::to_string(axis.key_origin) +
                                " to " + std::to_string(axis.key_origin + axis.key_extent - 1) +
                                "; pass more keys, or correct grid, query_origin or key_origin");
  });
}

void check(Problem const& problem) {
  for (int i = 0; i < problem.rank; ++i) check(problem.axes[kMaxRank - problem.rank + i], i);
  require(problem.batch >= 0, with_value("batch", problem.batch) + " must not be negative");
  require(problem.heads >= 1, with_value("heads", problem.heads) + " must be at least 1");
  require(problem.heads_kv >= 1 && problem.heads % problem.heads_kv == 0,
          with_value("heads", problem.heads) + " must be a multiple of " + with_value("heads_kv", problem.heads_kv));
  require(problem.head_dim >= 1, with_value("head_dim", problem.head_dim) + " must be at least 1");
  require(problem.head_dim_value >= 1, with_value("head_dim_value", problem.head_dim_value) + " must be at least 1");
  require(problem.additional_keys >= 0,
          with_value("additional_keys", problem.additional_keys) + " must not be negative");
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> ids;
  for (Isa const& isa : isas()) {
    if (isa.runs_here) ids.emplace_back(isa.id);
  }
  return ids;
}

std::string resolve_isa(std::string const& wanted) {
  auto const possible = cpu_isas();
  if (wanted.empty()) return possible.empty() ? kBaseline : possible.front();
  if (std::find(possible.begin(), possible.end(), wanted) != possible.end()) return wanted;
  std::string list;
  for (auto const& id : possible) list += (list.empty() ? "" : ", ") + id;
  throw std::invalid_argument("NATTEN_CPU_ISA = '" + wanted + "' is not an instruction set that this CPU can run; " +
                              (possible.empty() ? "there are none: unset it" : "possible here: " + list));
}

namespace {

std::string arch_name(int arch) { return arch == 0 ? "the CPU" : "SM" + std::to_string(arch); }

// A binary for one architecture runs on later ones of the same generation, PTX on all later ones.
bool runs_on(cuda::KernelInfo const& code, int arch) {
  return (code.ptx_arch != 0 && code.ptx_arch <= arch) ||
         std::any_of(code.archs, code.archs + code.num_archs,
                     [&](int compiled) { return compiled / 10 == arch / 10 && compiled <= arch; });
}

void cpu_reasons(Kernel const& kernel, Device const& device, bool is_named, std::vector<std::string>& why) {
  if (device.arch != 0) {
    why.push_back("runs on the CPU, and the tensors are on " + arch_name(device.arch));
  } else if (!runs_here(kernel.isa)) {
    why.push_back("needs " + std::string(kernel.isa) + ", which this CPU does not have");
  } else if (!is_named && kernel.isa != device.isa && kernel.isa != std::string(kBaseline)) {
    why.push_back("is compiled for " + std::string(kernel.isa) + ", and " + device.isa + " is in force");
  }
}

void cuda_reasons(Kernel const& kernel, Problem const& problem, Device const& device, bool is_named,
                  std::vector<std::string>& why) {
  CudaTraits const& traits = kernel.cuda;
  if (traits.is_emulated) {
    if (device.arch != 0) why.push_back("is emulated on the CPU, and the tensors are on " + arch_name(device.arch));
    return;
  }
  if (device.arch == 0) {
    why.push_back("runs on a GPU, and the tensors are on the CPU");
    return;
  }
  if (device.arch < traits.min_arch || (!is_named && device.arch > traits.max_arch)) {
    std::string const end = traits.max_arch == cuda::kAnyLater ? " and later" : " to " + arch_name(traits.max_arch);
    why.push_back("is for " + arch_name(traits.min_arch) + end + ", and the tensors are on " + arch_name(device.arch));
  }
  if (traits.is_tf32 && !problem.allow_tf32 && !is_named) {
    why.push_back("rounds to TF32, which torch.backends.cuda.matmul does not allow");
  }
  if (device.is_pretended) return;
  cuda::KernelInfo const* const code = find_code(kernel);
  if (code == nullptr) {
    std::string const error = error_of_own_library();
    why.push_back(error.empty() ? "is not in this build of natten (NATTEN_CUDA, NATTEN_CUDA_ARCHS)"
                                : "is in a library that cannot be loaded: " + error);
  } else if (!runs_on(*code, device.arch)) {
    std::string archs;
    for (int i = 0; i < code->num_archs; ++i) archs += (i > 0 ? ", " : "") + arch_name(code->archs[i]);
    why.push_back("is compiled for " + archs + ", and the tensors are on " + arch_name(device.arch));
  } else if (std::string const trouble = trouble_with_driver(kernel); !trouble.empty()) {
    why.push_back(trouble);
  }
}

}  // namespace

bool has_code_for(int arch) {
  auto const& table = kernels();
  return std::any_of(table.begin(), table.end(), [&](Kernel const& kernel) {
    if (!kernel.cuda.is_cuda || kernel.cuda.is_emulated) return false;
    cuda::KernelInfo const* const code = find_code(kernel);
    return code != nullptr && runs_on(*code, arch) && trouble_with_driver(kernel).empty();
  });
}

std::vector<std::string> reasons(Kernel const& kernel, Problem const& problem, Device const& device, bool is_named) {
  std::vector<std::string> why;
  if (kernel.dtype != problem.dtype) {
    why.push_back("computes " + dtype_name(kernel.dtype) + ", and the problem is " + dtype_name(problem.dtype));
  }
  if (kernel.cuda.is_cuda) {
    cuda_reasons(kernel, problem, device, is_named, why);
  } else {
    cpu_reasons(kernel, device, is_named, why);
  }
  int const head_dim = std::max(problem.head_dim, problem.head_dim_value);
  if (head_dim > kernel.max_head_dim) {
    why.push_back("handles head dims up to " + std::to_string(kernel.max_head_dim) + ", and the problem has " +
                  std::to_string(head_dim));
  }
  return why;
}

namespace {

// Whether `backend` is the name of this kernel, or of its policy or ISA. CUDA kernels that are alike on all architectures
// belong to every policy of their backend.
bool is_named_by(std::string const& backend, Kernel const& kernel) {
  constexpr char const* kAnyArch = "naive";
  auto const policy_of = [](Kernel const& row) { return row.backend + std::string(":") + row.isa; };
  if (backend == kernel.name || backend == policy_of(kernel)) return true;
  bool const is_alike = kernel.cuda.is_cuda && kernel.isa == std::string(kAnyArch);
  if (!is_alike || backend.rfind(kernel.backend + std::string(":"), 0) != 0) return false;
  auto const& table = kernels();
  return std::any_of(table.begin(), table.end(),
                     [&](Kernel const& row) { return row.cuda.is_cuda && backend == policy_of(row); });
}

}  // namespace

std::vector<Candidate> candidates(Problem const& problem, Op op, std::string const& backend, Device const& device) {
  Device resolved = device;
  if (device.arch == 0) resolved.isa = resolve_isa(device.isa);
  std::vector<Candidate> list;
  for (Kernel const& kernel : kernels()) {
    bool const is_named = is_named_by(backend, kernel);
    if (kernel.op != op || (backend != "auto" && backend != kernel.backend && !is_named)) continue;
    if (!is_named && (kernel.cuda.is_emulated || kernel.cuda.is_cuda != (device.arch != 0))) continue;
    list.push_back({&kernel, reasons(kernel, problem, resolved, is_named)});
  }
  return list;
}

Kernel const& find_kernel(std::string const& name, Op op, Problem const& problem, Device const& device) {
  auto const& table = kernels();
  auto const kernel = std::find_if(table.begin(), table.end(), [&](Kernel const& row) { return row.name == name; });
  require(kernel != table.end() && kernel->op == op, "there is no " + op_name(op) + " kernel called '" + name + "'");
  auto const why = reasons(*kernel, problem, device, true);
  require(why.empty(), why.empty() ? "" : name + " " + why.front());
  return *kernel;
}

namespace {

// 20 to 40 microseconds of a thread's time on a Zen 4, where small problems go at 13 to 28 multiplications a nanosecond.
std::atomic<double> least_work{1 << 19};

// Multiplications that a kernel does, or could do in the time that it needs for what else a token takes.
double work_of(Op op, Problem const& problem) {
  constexpr double kPerToken = 8;  // as many as its products with so many keys
  double queries = double(problem.batch) * problem.heads, keys = double(problem.batch) * problem.heads_kv;
  double window = 1;
  for (Axis const& axis : problem.axes) {
    queries *= axis.query_extent;
    keys *= axis.key_extent;
    window *= std::min(axis.kernel_size, axis.key_extent);
  }
  bool const is_fused = op == Op::kForward || op == Op::kBackward;
  bool const has_key_results = op == Op::kBackward || op == Op::kAvTransposed;
  double const per_query = window + (is_fused ? problem.additional_keys : 0) + kPerToken;
  double const products = queries * per_query + (has_key_results ? keys * kPerToken : 0);
  double const dims = problem.head_dim + (is_fused ? problem.head_dim_value : 0);
  return products * dims * (op == Op::kBackward ? 2.5 : 1);
}

}  // namespace

int useful_threads(Kernel const& kernel, Problem const& problem, int num_threads) {
  constexpr double kSlower = 8;  // the naive kernels, which use no SIMD: 3 to 4 multiplications a nanosecond
  double const work = work_of(kernel.op, problem) * (kernel.backend == std::string("naive") ? kSlower : 1);
  double const least = least_work.load(std::memory_order_relaxed);
  if (work >= least * num_threads) return num_threads;
  return std::max(1, static_cast<int>(work / least));
}

double set_least_work(double multiplications) { return least_work.exchange(multiplications); }

}  // namespace natten
