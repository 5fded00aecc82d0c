// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward: one pass where there is room for the sums of the side that is streamed, over query tiles
// if they slide, else over key tiles; otherwise a pass over each.
#pragma once

#include "natten/cpu/fna_forward.hpp"
#include "natten/cpu/grad_key_value.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Whether a row's LSE is too large to compute weights from.
inline bool has_coarse_lse(BackwardArguments const& arguments) {
  Problem const& problem = arguments.problem;
  TensorRef const& lse = arguments.lse;
  int const lines = problem.axes[1].query_extent, tokens = problem.axes[2].query_extent;
  int const slices = problem.axes[0].query_extent;
  bool const is_dense = lse.stride_head == 1 && lse.stride_axis[2] == problem.heads;
  // One thread reads the LSE of so many rows in a small part of the time that their gradients take; on a busy machine, a region of
  // its own for that made the backward pass of a small problem half as long again.
  constexpr std::int64_t kRowsOfThread = 1 << 20;
  std::int64_t const worth = 1 + all_tokens(problem, problem.heads, &Axis::query_extent) / kRowsOfThread;
  int const num_threads = worth < arguments.num_threads ? static_cast<int>(worth) : arguments.num_threads;
  int found = 0;
  for_each_item(problem.batch * slices, num_threads, [&](std::int64_t i) {
    float const* const slice =
        static_cast<float const*>(lse.data) + i / slices * lse.stride_batch + i % slices * lse.stride_axis[0];
    int coarse = 0;
    auto const look_at = [&](float const* numbers, std::int64_t count, std::int64_t step) {
      for (std::int64_t n = 0; n < count; ++n) coarse |= int(is_coarse_lse(numbers[n * step]));
    };
    for (int y = 0; y < lines; ++y) {
      float const* const line = slice + y * lse.stride_axis[1];
      if (is_dense) {
        look_at(line, std::int64_t{tokens} * problem.heads, 1);
        continue;
      }
      for (int h = 0; h < problem.heads; ++h) look_at(line + h * lse.stride_head, tokens, lse.stride_axis[2]);
    }
    if (coarse) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
  });
  return found != 0;
}

template <class Math>
void compute_gradients(GradArguments const& arguments) {
  if (grad_query_with_keys<Math>(arguments)) return;
  GradKeyValue<Math> const with_query(arguments, KeySource::kWindow, /*num_threads=*/1, /*with_query=*/true);
  if (with_query.can_run_with_query()) {
    with_query.run_with_query();
    return;
  }
  grad_query<Math>(arguments);
  GradKeyValue<Math>(arguments, KeySource::kWindow, arguments.num_threads).run();
  if (arguments.problem.additional_keys > 0) {
    GradKeyValue<Math>(arguments, KeySource::kAdditional, arguments.num_threads).run();
  }
}

// The same with LSE made anew, in two numbers a row: a forward pass without values.
template <class Math>
void compute_gradients_of_large_logits(GradArguments arguments) {
  Problem const& problem = arguments.problem;
  std::int64_t const rows = all_tokens(problem, problem.heads, &Axis::query_extent);
  ZeroedFloats const statistics(2 * rows);
  auto const statistic = [&](int index) {
    TensorRef tensor;
    tensor.data = statistics.data() + index * rows;
    tensor.stride_head = 1;
    std::int64_t stride = problem.heads;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      tensor.stride_axis[a] = stride;
      stride *= problem.axes[a].query_extent;
    }
    tensor.stride_batch = stride;
    return tensor;
  };
  arguments.lse = statistic(0);
  arguments.origin = statistic(1);

  ForwardArguments forward;
  forward.problem = problem;
  forward.problem.head_dim_value = 0;
  forward.query = arguments.query;
  forward.key = arguments.key;
  forward.additional_keys = arguments.additional_keys;
  forward.rpb = arguments.rpb;
  forward.lse = arguments.lse;
  forward.num_threads = arguments.num_threads;
  run_query_blocks<Math>(Forward<Math>(forward, arguments.origin), arguments.num_threads);
  compute_gradients<Math>(arguments);
}

template <class Storage>
void fna_backward(BackwardArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  GradArguments arguments{original, {}};
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.value, arguments.output,
                      arguments.lse, arguments.d_output, arguments.d_lse, arguments.d_query, arguments.d_key,
                      arguments.d_value);
  if (has_coarse_lse(arguments)) compute_gradients_of_large_logits<Math>(arguments);
  else compute_gradients<Math>(arguments);
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
