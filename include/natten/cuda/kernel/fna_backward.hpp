// SPDX-License-Identifier: MIT
// The backward pass of fused neighborhood attention: delta, the gradient of the query, those of key and value, and the
// sum of the bias tables.
#pragma once

#include "natten/cuda/kernel/delta.hpp"
#include "natten/cuda/kernel/fna_gradient.hpp"

namespace natten::cuda {

// What lies in the workspace: delta, and a table of the bias gradient for each block that sums one.
struct FnaWorkspace {
  // Blocks that share a head's sum: enough to fill the largest GPUs (144 multiprocessors) about twice.
  static constexpr std::int64_t kBiasBlocks = 256;

  TensorRef delta;
  float* bias_tables = nullptr;
  std::int64_t parts = 0;  // tables of a head
  std::int64_t bytes = 0;

  static FnaWorkspace make(BackwardArguments const& a, LaunchContext const& context) {
    FnaWorkspace w;
    Problem const& problem = a.problem;
    auto const take = [&](std::int64_t floats) {
      char* const place = static_cast<char*>(context.workspace) + w.bytes;
      w.bytes += (floats * std::int64_t(sizeof(float)) + 255) / 256 * 256;
      return place;
    };
    w.delta = delta_tensor(problem, take(make_delta_params<float>(a, nullptr).rows));
    if (a.d_rpb != nullptr) {
      std::int64_t const items = Partition::make(problem, Side::kQuery, context.by_query).items / problem.heads;
      std::int64_t const wanted = (kBiasBlocks + problem.heads - 1) / problem.heads;
      w.parts = items < wanted ? items : wanted;
      w.bias_tables = reinterpret_cast<float*>(take(w.parts * problem.heads * BiasIndex::make(problem).entries));
    }
    return w;
  }
};

template <class Policy>
std::int64_t fna_backward_workspace(BackwardArguments const& arguments, LaunchContext const& context) {
  return FnaWorkspace::make(arguments, context).bytes;
}

template <class Policy, class Launch>
void run_fna_backward(BackwardArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Element = typename Policy::Element;
  auto const workspace = FnaWorkspace::make(arguments, context);
  auto const differentiate = [&](auto kernel, float* bias_tables) {
    using Kernel = decltype(kernel);
    auto const params = Kernel::make_params(arguments, context, workspace.delta, bias_tables);
    launch(kernel, params, Kernel::blocks(params, workspace.parts * arguments.problem.heads, context),
           Kernel::shared_bytes(params));
  };

  auto const delta = make_delta_params<Element>(arguments, workspace.delta.data);
  launch(Delta<Element>{}, delta, Delta<Element>::blocks(delta, context), 0);
  differentiate(FnaGradient<Policy, Side::kQuery>{}, workspace.bias_tables);
  differentiate(FnaGradient<Policy, Side::kKey>{}, nullptr);
  if (workspace.bias_tables != nullptr) {
    using Sum = SumBiasTables<float>;
    Sum::Params sum{workspace.bias_tables, static_cast<float*>(arguments.d_rpb), 0, workspace.parts};
    sum.size = std::int64_t{arguments.problem.heads} * BiasIndex::make(arguments.problem).entries;
    launch(Sum{}, sum, Sum::blocks(sum.size), 0);
  }
}

}  // namespace natten::cuda
