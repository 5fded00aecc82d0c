// SPDX-License-Identifier: MIT
// The two matrix products of attention, on tiles in shared memory and fragments in registers. Both accumulate in
// float32, whatever the atom.
#pragma once

#include "natten/cuda/collective/tile.hpp"

namespace natten::cuda {

// Blocks of K that are unrolled. With all of a longer row the compiler keeps their addresses in registers, and spills: a few
// bytes with 8, more with 16.
constexpr int unrolled_blocks(int blocks) { return blocks <= 4 ? blocks : 2; }

template <class Mma, int kRows, int kColumns>
CUTE_DEVICE auto make_accumulator() {
  auto accumulator = partition_fragment_C(Mma{}, Shape<Int<kRows>, Int<kColumns>>{});
  clear(accumulator);
  return accumulator;
}

// What was stored to what the atom multiplies.
template <class Raw, class Operand>
CUTE_DEVICE void convert(Raw const& raw, Operand& operand) {
  using To = typename Operand::value_type;
  CUTE_UNROLL
  for (int i = 0; i < size(raw); ++i) {
    if constexpr (is_same_v<typename Raw::value_type, To>) {
      operand(i) = raw(i);
    } else {
      operand(i) = To(float(raw(i)));
    }
  }
}

// accumulator += block (V, M, K) of the first operand times blocks `k` of the second, in shared memory: column by column
// of atoms, so that few of its fragments are in registers at once.
template <class Mma, class CopyB, class Accumulator, class FragmentA, class B>
CUTE_DEVICE void multiply_block(Accumulator& accumulator, FragmentA const& a, B const& b, int k, int thread) {
  using Element = typename B::value_type;
  using Operand = typename Mma::ValTypeB;
  Mma const mma;
  constexpr int kBlock = decltype(tile_size<2>(mma))::value;
  constexpr int kTileN = decltype(tile_size<1>(mma))::value;
  constexpr int kPieces = decltype(size<0>(b))::value / kTileN;
  constexpr int kAtoms = decltype(size<2>(accumulator))::value / kPieces;  // along N in a piece

  auto const copy_b = make_tiled_copy_B(Copy_Atom<CopyB, Element>{}, mma);
  auto const shared_b = copy_b.get_thread_slice(thread).partition_S(b);
  auto const pieces = make_tensor(accumulator.data(), logical_divide(accumulator.layout(), Shape<X, X, Int<kAtoms>>{}));
  CUTE_UNROLL
  for (int n = 0; n < kPieces; ++n) {
    auto operand = make_tensor<Operand>(partition_shape_B(mma, Shape<Int<kTileN>, Int<kBlock>>{}));
    auto raw = make_tensor<Element>(operand.layout());
    auto view = copy_b.get_thread_slice(thread).retile_D(raw);
    copy(copy_b, shared_b(_, n, k), view(_, 0, 0));
    convert(raw, operand);
    auto piece = pieces(_, _, make_coord(_, n));
    CUTE_UNROLL
    for (int i = 0; i < size<2>(a); ++i) gemm(mma, a(_, _, i), operand(_, _, i), piece);
  }
}

// accumulator (M, N) += a (M, K) b (N, K)^T, with both operands in shared memory.
template <class Mma, class CopyA, class CopyB, class Accumulator, class A, class B>
CUTE_DEVICE void multiply(Accumulator& accumulator, A const& a, B const& b, int thread) {
  using Element = typename A::value_type;
  Mma const mma;
  constexpr int kBlock = decltype(tile_size<2>(mma))::value;
  constexpr int kBlocks = decltype(size<1>(a))::value / kBlock;
  auto const copy_a = make_tiled_copy_A(Copy_Atom<CopyA, Element>{}, mma);
  auto const shared_a = copy_a.get_thread_slice(thread).partition_S(a);

#pragma unroll(unrolled_blocks(kBlocks))
  for (int k = 0; k < kBlocks; ++k) {
    auto operand = make_tensor<typename Mma::ValTypeA>(partition_shape_A(mma, make_shape(size<0>(a), Int<kBlock>{})));
    auto raw = make_tensor<Element>(operand.layout());
    auto view = copy_a.get_thread_slice(thread).retile_D(raw);
    copy(copy_a, shared_a(_, _, k), view(_, _, 0));
    convert(raw, operand);
    multiply_block<Mma, CopyB>(accumulator, operand, b, k, thread);
  }
}

// The same with `a` in registers already, as fragments (V, M, K) of the atom.
template <class Mma, class CopyB, class Accumulator, class FragmentA, class B>
CUTE_DEVICE void multiply_fragment(Accumulator& accumulator, FragmentA const& a, B const& b, int thread) {
  constexpr int kBlock = decltype(tile_size<2>(Mma{}))::value;
  constexpr int kBlocks = decltype(size<1>(b))::value / kBlock;
  constexpr int kAtoms = decltype(size<2>(a))::value / kBlocks;  // along K in a block
  auto const blocks = make_tensor(a.data(), logical_divide(a.layout(), Shape<X, X, Int<kAtoms>>{}));

  CUTE_UNROLL  // a fragment in registers cannot be indexed
      for (int k = 0; k < kBlocks; ++k) {
    multiply_block<Mma, CopyB>(accumulator, blocks(_, _, make_coord(_, k)), b, k, thread);
  }
}

}  // namespace natten::cuda
