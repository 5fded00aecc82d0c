// SPDX-License-Identifier: MIT
// The Python module natten._C, as python/natten/_C.pyi describes it. Tensors arrive as addresses and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/fork.hpp"
#include "cpu/results.hpp"
#include "cpu/scratch.hpp"
#include "dispatch/dispatch.hpp"
#include "dispatch/names.hpp"
#include "dispatch/planning.hpp"
#include "natten/cpu/parallel.hpp"
#include "register_window.hpp"

namespace py = pybind11;

namespace pybind11::detail {

// (address, batch stride, axis strides, head stride), innermost axis last. By hand: a call brings up to 15 of them, and
// nested generic casters would take longer than a small kernel.
template <>
struct type_caster<natten::TensorRef> {
  PYBIND11_TYPE_CASTER(natten::TensorRef, const_name("tuple[int, int, tuple[int, ...], int]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* const strides = PyTuple_GET_ITEM(source.ptr(), 2);
    if (!PyTuple_Check(strides)) return false;
    auto const rank = PyTuple_GET_SIZE(strides);
    if (rank < 1 || rank > natten::kMaxRank) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.stride_batch = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 1));
    value.stride_head = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 3));
    for (int i = 0; i < rank; ++i) {
      value.stride_axis[natten::kMaxRank - rank + i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace natten {

namespace {

template <std::size_t N>
int index_of(std::array<char const*, N> const& names, std::string const& name, char const* what) {
  std::string list;
  for (std::size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    list += (i ? ", " : "") + std::string(names[i]);
  }
  throw std::invalid_argument(std::string(what) + " = '" + name + "' must be one of " + list);
}

Op op_of(std::string const& name) { return static_cast<Op>(index_of(kOpNames, name, "op")); }

// A problem, and the tiles that kernels run it with: found once, at the first launch. To ask what could run it costs no plan.
struct PlannedProblem : Problem {
  TileShapes shapes_for(Side side, int own_tokens, int streamed_tokens) const {
    if (own_tokens == 0) return {};
    if (!is_tile_size(own_tokens) || !is_tile_size(streamed_tokens)) {
      throw std::invalid_argument("own = " + std::to_string(own_tokens) +
                                  ", streamed = " + std::to_string(streamed_tokens) +
                                  "; wanted powers of two, at most " + std::to_string(kMostTileTokens));
    }
    std::lock_guard const lock(plan->mutex);
    auto const [entry, is_new] = plan->shapes.try_emplace({static_cast<int>(side), own_tokens, streamed_tokens});
    if (is_new) {
      TileShapes fixed = {{0, 0, 0}, {0, 0, 0}};
      fix(fixed.own, side, own_tokens);
      fix(fixed.streamed, side == Side::kQuery ? Side::kKey : Side::kQuery, streamed_tokens);
      entry->second = choose_tile_shapes(*this, side, own_tokens, streamed_tokens, fixed);
    }
    return entry->second;
  }

  // The user's shape of a tile, if it has as many tokens as are wanted: the passes of a backward kernel differ in that.
  void fix(int (&shape)[kMaxRank], Side side, int tokens) const {
    auto const& mine = wanted[static_cast<int>(side)];
    if (mine[0] * mine[1] * mine[2] == tokens) std::copy(mine, mine + kMaxRank, shape);
  }

  // Those of the CPU's kernels.
  TileTable const& tiles_for_cpu() const {
    std::lock_guard const lock(plan->mutex);
    if (!plan->has_tiles) {
      Problem copy = *this;
      choose_tiles(copy);
      plan->tiles = copy.tiles;
      plan->has_tiles = true;
    }
    return plan->tiles;
  }

  int wanted[2][kMaxRank] = {};  // shapes that the user wants of tiles of queries and of keys; 0: none

 private:
  struct Plan {
    std::mutex mutex;
    std::map<std::array<int, 3>, TileShapes> shapes;  // of CUDA kernels, by side and numbers of tokens
    bool has_tiles = false;
    TileTable tiles;
  };
  std::shared_ptr<Plan> plan = std::make_shared<Plan>();
};

PlannedProblem make_problem(std::string const& dtype, std::vector<int> const& axes, std::int64_t batch, int heads,
                            int heads_kv, int head_dim, int head_dim_value, int additional_keys, bool has_rpb,
                            double scale, bool allow_tf32, std::vector<int> const& tile_shapes) {
  int const rank = static_cast<int>(axes.size()) / kAxisFields;
  if (rank < 1 || rank > kMaxRank || rank * kAxisFields != static_cast<int>(axes.size())) {
    throw std::invalid_argument("axes must hold " + std::to_string(kAxisFields) + " integers for each of 1 to " +
                                std::to_string(kMaxRank) + " axes, not " + std::to_string(axes.size()));
  }
  PlannedProblem problem;
  problem.dtype = static_cast<DType>(index_of(kDTypeNames, dtype, "dtype"));
  problem.rank = rank;
  for (int i = 0; i < rank; ++i) problem.axes[kMaxRank - rank + i] = make_axis(axes.data() + i * kAxisFields);
  problem.batch = batch;
  problem.heads = heads;
  problem.heads_kv = heads_kv;
  problem.head_dim = head_dim;
  problem.head_dim_value = head_dim_value;
  problem.additional_keys = additional_keys;
  problem.has_rpb = has_rpb;
  problem.scale = scale;
  problem.allow_tf32 = allow_tf32;
  check(problem);
  if (!tile_shapes.empty()) {
    if (static_cast<int>(tile_shapes.size()) != 2 * rank) {
      throw std::invalid_argument("tile_shapes must hold " + std::to_string(2 * rank) + " integers, not " +
                                  std::to_string(tile_shapes.size()));
    }
    for (int side = 0; side < 2; ++side) {
      int const* const shape = tile_shapes.data() + side * rank;
      std::fill(problem.wanted[side], problem.wanted[side] + kMaxRank - rank, 1);
      std::copy(shape, shape + rank, problem.wanted[side] + kMaxRank - rank);
    }
  }
  return problem;
}

void check_present(Problem const& problem, bool additional_tokens, bool rpb) {
  if (problem.batch == 0) return;  // tensors without elements have address 0
  if (additional_tokens != (problem.additional_keys > 0)) {
    throw std::invalid_argument("additional tokens must be given if and only if the problem has some");
  }
  if (rpb != problem.has_rpb) throw std::invalid_argument("rpb must be given if and only if the problem has one");
}

cuda::LaunchContext launch_context(PlannedProblem const& problem, cuda::KernelInfo const& code, std::uintptr_t stream,
                                   std::uintptr_t workspace) {
  cuda::LaunchContext context;
  context.stream = reinterpret_cast<void*>(stream);
  context.workspace = reinterpret_cast<void*>(workspace);
  context.by_query = problem.shapes_for(Side::kQuery, code.own_tokens, code.streamed_tokens);
  bool const owns_keys = code.op == Op::kBackward || code.op == Op::kAvTransposed;
  if (owns_keys) context.by_key = problem.shapes_for(Side::kKey, code.own_tokens, code.streamed_tokens);
  return context;
}

// Runs a kernel by its entry point: `on_cpu` or, in a library, `on_gpu`.
template <class Arguments>
void run(Kernel const& kernel, void (*Kernel::*on_cpu)(Arguments const&),
         cuda::Entry<Arguments> cuda::KernelInfo::* on_gpu, PlannedProblem const& problem, Arguments& arguments,
         std::uintptr_t stream, std::uintptr_t workspace) {
  if (!kernel.cuda.is_cuda) {
    arguments.num_threads = useful_threads(kernel, problem, arguments.num_threads);
    arguments.problem.tiles = problem.tiles_for_cpu();
    py::gil_scoped_release const released;
    cpu::provide_pages(arguments, kernel.op);
    (kernel.*on_cpu)(arguments);
    return;
  }
  cuda::KernelInfo const& code = *find_code(kernel);
  cuda::LaunchContext const context = launch_context(problem, code, stream, workspace);
  std::array<char, 512> message{};
  int failed;
  {
    py::gil_scoped_release const released;
    failed = (code.*on_gpu).run(&arguments, &context, message.data(), static_cast<int>(message.size()));
  }
  if (failed != 0) throw std::runtime_error(message.data());
}

void forward(PlannedProblem const& problem, std::string const& kernel, TensorRef const& query, TensorRef const& key,
             TensorRef const& value, TensorRef const& additional_keys, TensorRef const& additional_values,
             std::uintptr_t rpb, TensorRef const& output, TensorRef const& lse, int num_threads, int arch,
             std::uintptr_t stream, std::uintptr_t workspace) {
  Kernel const& row = find_kernel(kernel, Op::kForward, problem, {arch, false, {}});
  check_present(problem, additional_keys && additional_values, rpb != 0);
  ForwardArguments a;
  a.problem = problem;
  a.query = query;
  a.key = key;
  a.value = value;
  a.additional_keys = additional_keys;
  a.additional_values = additional_values;
  a.rpb = reinterpret_cast<void const*>(rpb);
  a.output = output;
  a.lse = lse;
  a.num_threads = num_threads;
  run(row, &Kernel::forward, &cuda::KernelInfo::forward, problem, a, stream, workspace);
}

void backward(PlannedProblem const& problem, std::string const& kernel, TensorRef const& query, TensorRef const& key,
              TensorRef const& value, TensorRef const& additional_keys, TensorRef const& additional_values,
              std::uintptr_t rpb, TensorRef const& output, TensorRef const& lse, TensorRef const& d_output,
              TensorRef const& d_lse, TensorRef const& d_query, TensorRef const& d_key, TensorRef const& d_value,
              TensorRef const& d_additional_keys, TensorRef const& d_additional_values, std::uintptr_t d_rpb,
              int num_threads, int arch, std::uintptr_t stream, std::uintptr_t workspace) {
  Kernel const& row = find_kernel(kernel, Op::kBackward, problem, {arch, false, {}});
  check_present(problem, additional_keys && additional_values, rpb != 0);
  check_present(problem, d_additional_keys && d_additional_values, d_rpb != 0);
  BackwardArguments a;
  a.problem = problem;
  a.query = query;
  a.key = key;
  a.value = value;
  a.additional_keys = additional_keys;
  a.additional_values = additional_values;
  a.rpb = reinterpret_cast<void const*>(rpb);
  a.output = output;
  a.lse = lse;
  a.d_output = d_output;
  a.d_lse = d_lse;
  a.d_query = d_query;
  a.d_key = d_key;
  a.d_value = d_value;
  a.d_additional_keys = d_additional_keys;
  a.d_additional_values = d_additional_values;
  a.d_rpb = reinterpret_cast<void*>(d_rpb);
  a.num_threads = num_threads;
  run(row, &Kernel::backward, &cuda::KernelInfo::backward, problem, a, stream, workspace);
}

void unfused(PlannedProblem const& problem, std::string const& op, std::string const& kernel, TensorRef const& query,
             TensorRef const& key, TensorRef const& weights, std::uintptr_t rpb, std::uintptr_t d_rpb,
             double unused_value, int num_threads, int arch, std::uintptr_t stream, std::uintptr_t workspace) {
  if (op_of(op) < Op::kQk) throw std::invalid_argument("op = '" + op + "' is fused");
  Kernel const& row = find_kernel(kernel, op_of(op), problem, {arch, false, {}});
  UnfusedArguments a;
  a.problem = problem;
  a.query = query;
  a.key = key;
  a.weights = weights;
  a.rpb = reinterpret_cast<void const*>(rpb);
  a.d_rpb = reinterpret_cast<void*>(d_rpb);
  a.unused = unused_value;
  a.num_threads = num_threads;
  run(row, &Kernel::unfused, &cuda::KernelInfo::unfused, problem, a, stream, workspace);
}

char const* forced_isa() {
  char const* const isa = std::getenv("NATTEN_CPU_ISA");
  return isa ? isa : "";
}

// Of device memory, that `kernel` wants as its workspace.
std::int64_t workspace_bytes(PlannedProblem const& problem, std::string const& op, std::string const& kernel,
                             int arch) {
  Kernel const& row = find_kernel(kernel, op_of(op), problem, {arch, false, {}});
  if (!row.cuda.is_cuda) return 0;
  cuda::KernelInfo const& code = *find_code(row);
  cuda::LaunchContext const context = launch_context(problem, code, 0, 0);
  std::int64_t nothing = 0;  // stands for a table that is there
  BackwardArguments backward_arguments;
  if (problem.has_rpb) backward_arguments.d_rpb = &nothing;
  UnfusedArguments unfused_arguments;
  if (row.op == Op::kRpbGradient) unfused_arguments.d_rpb = &nothing;
  auto const bytes = [&](auto const& entry, auto arguments) -> std::int64_t {
    if (entry.workspace_bytes == nullptr) return 0;
    arguments.problem = problem;
    return entry.workspace_bytes(&arguments, &context);
  };
  return bytes(code.forward, ForwardArguments()) + bytes(code.backward, backward_arguments) +
         bytes(code.unfused, unfused_arguments);
}

int num_parallel_threads(int num_threads) {
  std::atomic<int> count{0};
  cpu::parallel_region(num_threads, [](void* context, int) { ++*static_cast<std::atomic<int>*>(context); }, &count);
  return count;
}

void register_kernels(py::module_& module) {
  py::class_<Kernel>(module, "Kernel")
      .def_readonly("name", &Kernel::name)
      .def_property_readonly("op", [](Kernel const& kernel) { return op_name(kernel.op); })
      .def_readonly("backend", &Kernel::backend)
      .def_readonly("isa", &Kernel::isa)
      .def_property_readonly("dtypes", [](Kernel const& kernel) { return py::make_tuple(dtype_name(kernel.dtype)); })
      .def_readonly("max_head_dim", &Kernel::max_head_dim)
      .def_property_readonly("is_cuda", [](Kernel const& kernel) { return kernel.cuda.is_cuda; })
      .def_property_readonly("is_tf32", [](Kernel const& kernel) { return kernel.cuda.is_tf32; })
      .def_property_readonly("min_arch", [](Kernel const& kernel) { return kernel.cuda.min_arch; })
      .def_property_readonly("max_arch", [](Kernel const& kernel) { return kernel.cuda.max_arch; })
      .def_property_readonly(
          "tile",
          [](Kernel const& kernel) { return py::make_tuple(kernel.cuda.own_tokens, kernel.cuda.streamed_tokens); })
      .def_property_readonly("is_emulated", [](Kernel const& kernel) { return kernel.cuda.is_emulated; })
      .def_property_readonly("archs",
                             [](Kernel const& kernel) {
                               cuda::KernelInfo const* const code = kernel.cuda.is_cuda ? find_code(kernel) : nullptr;
                               if (code == nullptr) return std::vector<int>();
                               return std::vector<int>(code->archs, code->archs + code->num_archs);
                             })
      .def("__repr__", [](Kernel const& kernel) { return "<Kernel " + std::string(kernel.name) + ">"; });

  py::class_<PlannedProblem>(module, "Problem")
      .def(py::init(&make_problem), py::arg("dtype"), py::arg("axes"), py::arg("batch"), py::arg("heads"),
           py::arg("heads_kv"), py::arg("head_dim"), py::arg("head_dim_value"), py::arg("additional_keys"),
           py::arg("has_rpb"), py::arg("scale"), py::arg("allow_tf32") = false,
           py::arg("tile_shapes") = std::vector<int>())
      .def(
          "tile_shapes",
          [](PlannedProblem const& problem, bool of_keys, int own, int streamed) {
            TileShapes const shapes = problem.shapes_for(of_keys ? Side::kKey : Side::kQuery, own, streamed);
            int const first = kMaxRank - problem.rank;
            return std::make_pair(std::vector<int>(shapes.own + first, shapes.own + kMaxRank),
                                  std::vector<int>(shapes.streamed + first, shapes.streamed + kMaxRank));
          },
          py::arg("of_keys"), py::arg("own"), py::arg("streamed"))
      .def_property_readonly("queries_slide",
                             [](PlannedProblem const& problem) { return problem.tiles_for_cpu().queries_slide; });

  module.def(
      "kernels",
      [](std::string const& device) {
        constexpr std::array<char const*, 3> kDevices = {"cpu", "cuda", "emulation"};
        int const wanted = index_of(kDevices, device, "device");
        py::list list;
        for (Kernel const& kernel : kernels()) {
          if (kernel.cuda.is_cuda + kernel.cuda.is_emulated != wanted) continue;
          list.append(py::cast(&kernel, py::return_value_policy::reference));
        }
        return list;
      },
      py::arg("device") = "cpu");
  module.def(
      "candidates",
      [](PlannedProblem const& problem, std::string const& op, std::string const& backend, std::string const& isa,
         int arch, bool is_pretended) {
        py::list list;
        for (Candidate const& candidate : candidates(problem, op_of(op), backend, {arch, is_pretended, isa})) {
          list.append(
              py::make_tuple(py::cast(candidate.kernel, py::return_value_policy::reference), candidate.reasons));
        }
        return list;
      },
      py::arg("problem"), py::arg("op"), py::arg("backend"), py::arg("isa"), py::arg("arch") = 0,
      py::arg("is_pretended") = false);
  module.def("cpu_isas", &cpu_isas);
  module.def("forced_isa", &forced_isa);

  module.def("forward", &forward, py::arg("problem"), py::arg("kernel"), py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("additional_keys"), py::arg("additional_values"), py::arg("rpb"),
             py::arg("output"), py::arg("lse"), py::arg("num_threads"), py::arg("arch") = 0, py::arg("stream") = 0,
             py::arg("workspace") = 0);
  module.def("backward", &backward, py::arg("problem"), py::arg("kernel"), py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("additional_keys"), py::arg("additional_values"), py::arg("rpb"),
             py::arg("output"), py::arg("lse"), py::arg("d_output"), py::arg("d_lse"), py::arg("d_query"),
             py::arg("d_key"), py::arg("d_value"), py::arg("d_additional_keys"), py::arg("d_additional_values"),
             py::arg("d_rpb"), py::arg("num_threads"), py::arg("arch") = 0, py::arg("stream") = 0,
             py::arg("workspace") = 0);
  module.def("unfused", &unfused, py::arg("problem"), py::arg("op"), py::arg("kernel"), py::arg("query"),
             py::arg("key"), py::arg("weights"), py::arg("rpb"), py::arg("d_rpb"), py::arg("unused"),
             py::arg("num_threads"), py::arg("arch") = 0, py::arg("stream") = 0, py::arg("workspace") = 0);
  module.def("workspace_bytes", &workspace_bytes, py::arg("problem"), py::arg("op"), py::arg("kernel"),
             py::arg("arch") = 0);
  module.def("has_code_for", &has_code_for, py::arg("arch"));
  module.def("load_kernels", &load_kernels, py::arg("path"));
  module.def("libraries", [] {
    py::list list;
    for (LoadedLibrary const& library : libraries()) {
      list.append(py::make_tuple(library.path, library.contents->toolkit, library.contents->num_kernels));
    }
    return list;
  });
}

template <std::size_t N>
py::tuple names(std::array<char const*, N> const& list) {
  py::tuple result(N);
  for (std::size_t i = 0; i < N; ++i) result[i] = list[i];
  return result;
}

}  // namespace

}  // namespace natten

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled core. Knows no torch: tensors arrive as addresses and strides.";
  module.attr("DTYPES") = natten::names(natten::kDTypeNames);
  module.attr("BOUNDARIES") = natten::names(natten::kBoundaryNames);
  natten::register_kernels(module);
  natten::register_window(module);
  module.def("num_parallel_threads", &natten::num_parallel_threads, py::arg("num_threads"));
  module.def("set_least_work", &natten::set_least_work, py::arg("multiplications"));
  module.def("before_fork", &natten::cpu::before_fork);
  module.def("after_fork_in_parent", &natten::cpu::after_fork_in_parent);
  module.def("after_fork_in_child", &natten::cpu::after_fork_in_child);
  module.def("release_scratch", &natten::cpu::release_scratch);
}
