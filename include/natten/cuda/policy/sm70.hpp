// SPDX-License-Identifier: MIT
// Volta: 8x8x4 tensor core atoms for float16, each of a quad-pair (8 lanes), with operands loaded lane by lane.
#pragma once

#include <cute/atom/mma_traits_sm70.hpp>

#include "natten/cuda/collective/copy.hpp"
#include "natten/cuda/policy/policy.hpp"

namespace natten::cuda {

template <class Element, int kHeadDim, int kOwn, int kStreamed, int kStages>
struct Sm70 : PolicySizes<Element, kHeadDim, kOwn, kStreamed, kStages>, SynchronousCopy {
  static constexpr int kMaxSharedBytes = 96 * 1024;
  static constexpr int kWarps = kOwn / 16;
  // The operands of these atoms are wide: with 128 columns a gradient would spill 800 bytes.
  static constexpr int kColumnGroups = column_groups(kHeadDim, 64);
  static constexpr int kScoreThreads = 32 * kWarps;
  static constexpr int kThreads = kScoreThreads * kColumnGroups;
  // The four quad-pairs of a warp are a square of 16x16: bit 2 of the lane is the upper half's, bit 3 the right half's.
  using QuadPairs = Layout<Shape<Shape<_2, Int<kWarps>>, _2, _1>, Stride<Stride<_1, _4>, _2, _0>>;
  using Mma = TiledMMA<MMA_Atom<SM70_8x8x4_F32F16F16F32_TN>, QuadPairs>;
  using MmaTransposed = TiledMMA<MMA_Atom<SM70_8x8x4_F32F16F16F32_TT>,
                                 Layout<Shape<Shape<_2, Int<kWarps>>, Shape<_2, Int<kColumnGroups>>, _1>,
                                        Stride<Stride<_1, _4>, Stride<_2, Int<4 * kWarps>>, _0>>>;

  // Four elements that lie together: along K, or along N where the operand is stored row by row.
  using CopyOwn = UniversalCopy<std::uint64_t>;
  using CopyStreamed = UniversalCopy<std::uint64_t>;
  using CopyTransposed = UniversalCopy<std::uint64_t>;
  using CopyScores = UniversalCopy<std::uint64_t>;
  static constexpr bool kOperandInRegisters = false;
  using RowOrder = void;

  // Within a quad-pair bit 1 of the lane moves along the columns, and so does bit 3 between quad-pairs.
  static constexpr int kRowLanes = 2 + 8;

  // An accumulator ((2, 2, 2), M, N) has a row's two bits of column around the bit of the row.
  template <class Layout>
  CUTE_DEVICE static auto rows_by_columns(Layout const& l) {
    return make_layout(make_layout(get<0, 1>(l), get<1>(l)), make_layout(get<0, 0>(l), get<0, 2>(l), get<2>(l)));
  }
  template <class Layout>
  CUTE_DEVICE static auto transposed_rows_by_columns(Layout const& l) {
    return rows_by_columns(l);
  }
};

}  // namespace natten::cuda
