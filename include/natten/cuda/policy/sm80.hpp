// SPDX-License-Identifier: MIT
// Ampere and Ada: asynchronous copies, and tensor cores for float16, bfloat16 and TF32.
#pragma once

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "natten/cuda/collective/copy.hpp"
#include "natten/cuda/policy/simt.hpp"
#include "natten/cuda/policy/tensor_core.hpp"

namespace natten::cuda {

constexpr int kSm86SharedBytes = 99 * 1024;  // and of SM89; SM80 has 163 KiB

template <class Element>
struct Sm80Atom;
template <>
struct Sm80Atom<half_t> {
  using type = SM80_16x8x16_F32F16F16F32_TN;
};
template <>
struct Sm80Atom<bfloat16_t> {
  using type = SM80_16x8x16_F32BF16BF16F32_TN;
};

template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm80 : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>,
              TensorCoreMath<typename Sm80Atom<Element>::type, kOwn, kHeadDim>,
              AsynchronousCopy {
  static constexpr int kMaxSharedBytes = kSm86SharedBytes;
  // Their addresses: with 8, CUDA 11.8 spills 8 bytes in the gradients of head dim 128.
  static constexpr int kUnrolledCopies = kHeadDim < 128 ? AsynchronousCopy::kUnrolledCopies : 4;

  // Accumulators of two neighbouring atoms, 16x8 each, hold what a 16x16 operand wants: ((2, 2), M, (2, N / 2)) is
  // read as ((2, 2, 2), M, N / 2).
  template <class Layout>
  CUTE_DEVICE static auto as_operand(Layout const& layout) {
    auto const l = logical_divide(layout, Shape<X, X, _2>{});
    return make_layout(make_layout(get<0, 0>(l), get<0, 1>(l), get<2, 0>(l)), get<1>(l), get<2, 1>(l));
  }
};

// float32 tensors, whose products round both factors to TF32 (10 bits of mantissa).
template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm80Tf32 : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>,
                  TensorCoreMath<SM80_16x8x8_F32TF32TF32F32_TN, kOwn, kHeadDim>,
                  AsynchronousCopy {
  static constexpr int kMaxSharedBytes = kSm86SharedBytes;

  // A matrix load moves 16-bit pairs, which it cannot transpose for a 32-bit type.
  using CopyTransposed = UniversalCopy<float>;

  // An accumulator holds columns 2t and 2t + 1 where an operand wants t and t + 4: the sum over columns may run in any
  // order, as long as the streamed tile's rows follow it.
  using RowOrder = Layout<Shape<Shape<_4, _2>, Int<kStreamed / 8>>, Stride<Stride<_2, _1>, _8>>;
  template <class Layout>
  CUTE_DEVICE static auto as_operand(Layout const& l) {
    return make_layout(make_layout(get<0, 1>(l), get<0, 0>(l)), get<1>(l), get<2>(l));
  }
};

// float32 tensors at full precision: fused multiply-adds of the ordinary cores.
template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm80Simt : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>,
                  SimtMath<Element, kOwn, kHeadDim>,
                  AsynchronousCopy {
  static constexpr int kMaxSharedBytes = kSm86SharedBytes;
};

}  // namespace natten::cuda
