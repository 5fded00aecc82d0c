// SPDX-License-Identifier: MIT
// Turing: tensor cores for float16, matrix loads, no asynchronous copies.
#pragma once

#include <cute/atom/mma_traits_sm75.hpp>

#include "natten/cuda/collective/copy.hpp"
#include "natten/cuda/policy/tensor_core.hpp"

namespace natten::cuda {

template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm75 : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>,
              TensorCoreMath<SM75_16x8x8_F32F16F16F32_TN, kOwn, kHeadDim>,
              SynchronousCopy {
  static constexpr int kMaxSharedBytes = 64 * 1024;

  // An accumulator of 16x8 is laid out as an operand of 16x8.
  template <class Layout>
  CUTE_DEVICE static auto as_operand(Layout const& layout) {
    return layout;
  }
};

}  // namespace natten::cuda
