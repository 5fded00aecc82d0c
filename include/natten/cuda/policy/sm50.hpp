// SPDX-License-Identifier: MIT
// Maxwell and Pascal, and the types for which later architectures have no tensor cores: float32 arithmetic.
#pragma once

#include "natten/cuda/collective/copy.hpp"
#include "natten/cuda/policy/simt.hpp"

namespace natten::cuda {

template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm50 : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>,
              SimtMath<Element, kOwn, kHeadDim>,
              SynchronousCopy {
  static constexpr int kMaxSharedBytes = 48 * 1024;
};

}  // namespace natten::cuda
