// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward: one pass where there is room for the sums of the side that is streamed, over query tiles
// if they slide, else over key tiles; otherwise a pass over each.
#pragma once

#include "natten/cpu/grad_key_value.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Storage>
void fna_backward(BackwardArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  BackwardArguments arguments = original;
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.value, arguments.output,
                      arguments.lse, arguments.d_output, arguments.d_lse, arguments.d_query, arguments.d_key,
                      arguments.d_value);

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

}  // namespace natten::cpu::NATTEN_CPU_ISA
