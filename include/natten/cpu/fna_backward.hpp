// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward: one pass over query tiles, one over key tiles.
#pragma once

#include "natten/cpu/grad_key_value.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Storage>
void fna_backward(BackwardArguments const& arguments) {
  using Math = typename MathFor<Storage>::Type;
  grad_query<Math>(arguments);
  GradKeyValue<Math>(arguments, KeySource::kWindow).run();
  if (arguments.problem.additional_keys > 0) GradKeyValue<Math>(arguments, KeySource::kAdditional).run();
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
