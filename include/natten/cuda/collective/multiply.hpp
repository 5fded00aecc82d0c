// SPDX-License-Identifier: MIT
// The two matrix products of attention, on tiles in shared memory and fragments in registers. Both accumulate in
// float32, whatever the atom.
#pragma once

#include "natten/cuda/collective/tile.hpp"

namespace natten::cuda {

// Blocks of K that are unrolled: all of up to 8. With all 16 or more of a long row the compiler keeps their addresses in
// registers, and spills.
constexpr int unrolled_blocks(int blocks) { return blocks <= 8 ? blocks : 2; }

// Copies block `k` of an operand from shared memory and converts it to what the atom multiplies.
template <class TiledCopy, class Shared, class Raw, class Operand>
CUTE_DEVICE void load_operand(TiledCopy const& copy_operand, Shared const& shared, int k, Raw& raw, Operand& operand,
                              int thread) {
  auto const slice = copy_operand.get_thread_slice(thread);
  auto view = slice.retile_D(raw);
  copy(copy_operand, shared(_, _, k), view(_, _, 0));
  if constexpr (is_same_v<typename Raw::value_type, typename Operand::value_type>) {
    copy(raw, operand);
  } else {
    CUTE_UNROLL
    for (int i = 0; i < size(raw); ++i) operand(i) = typename Operand::value_type(float(raw(i)));
  }
}

template <class Mma, int kRows, int kColumns>
CUTE_DEVICE auto make_accumulator() {
  auto accumulator = partition_fragment_C(Mma{}, Shape<Int<kRows>, Int<kColumns>>{});
  clear(accumulator);
  return accumulator;
}

// accumulator (M, N) += a (M, K) b (N, K)^T, with both operands in shared memory.
template <class Mma, class CopyA, class CopyB, class Accumulator, class A, class B>
CUTE_DEVICE void multiply(Accumulator& accumulator, A const& a, B const& b, int thread) {
  using Element = typename A::value_type;
  Mma const mma;
  constexpr int kBlock = decltype(tile_size<2>(mma))::value;
  constexpr int kBlocks = decltype(size<1>(a))::value / kBlock;

  auto const copy_a = make_tiled_copy_A(Copy_Atom<CopyA, Element>{}, mma);
  auto const copy_b = make_tiled_copy_B(Copy_Atom<CopyB, Element>{}, mma);
  auto const shared_a = copy_a.get_thread_slice(thread).partition_S(a);
  auto const shared_b = copy_b.get_thread_slice(thread).partition_S(b);
  auto const shape_a = partition_shape_A(mma, make_shape(size<0>(a), Int<kBlock>{}));
  auto const shape_b = partition_shape_B(mma, make_shape(size<0>(b), Int<kBlock>{}));
  auto raw_a = make_tensor<Element>(shape_a);
  auto raw_b = make_tensor<Element>(shape_b);
  auto operand_a = make_tensor<typename Mma::ValTypeA>(shape_a);
  auto operand_b = make_tensor<typename Mma::ValTypeB>(shape_b);

#pragma unroll(unrolled_blocks(kBlocks))
  for (int k = 0; k < kBlocks; ++k) {
    load_operand(copy_a, shared_a, k, raw_a, operand_a, thread);
    load_operand(copy_b, shared_b, k, raw_b, operand_b, thread);
    gemm(mma, operand_a, operand_b, accumulator);
  }
}

// The same with `a` in registers already, as fragments (V, M, K) of the atom.
template <class Mma, class CopyB, class Accumulator, class FragmentA, class B>
CUTE_DEVICE void multiply_fragment(Accumulator& accumulator, FragmentA const& a, B const& b, int thread) {
  using Element = typename B::value_type;
  Mma const mma;
  constexpr int kBlock = decltype(tile_size<2>(mma))::value;
  constexpr int kBlocks = decltype(size<1>(b))::value / kBlock;
  constexpr int kAtoms = decltype(size<2>(a))::value / kBlocks;  // along K in a block

  auto const copy_b = make_tiled_copy_B(Copy_Atom<CopyB, Element>{}, mma);
  auto const shared_b = copy_b.get_thread_slice(thread).partition_S(b);
  auto const shape_b = partition_shape_B(mma, make_shape(size<0>(b), Int<kBlock>{}));
  auto raw_b = make_tensor<Element>(shape_b);
  auto operand_b = make_tensor<typename Mma::ValTypeB>(shape_b);

#pragma unroll(unrolled_blocks(kBlocks))
  for (int k = 0; k < kBlocks; ++k) {
    load_operand(copy_b, shared_b, k, raw_b, operand_b, thread);
    CUTE_UNROLL
    for (int i = 0; i < kAtoms; ++i) {
      gemm(mma, a(_, _, k * kAtoms + i), operand_b(_, _, i), accumulator);
    }
  }
}

}  // namespace natten::cuda
