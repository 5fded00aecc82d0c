// SPDX-License-Identifier: MIT
// What the policies of the 16x8 tensor core atoms share (SM75 and later).
#pragma once

#include <cute/atom/copy_traits_sm75.hpp>

#include "natten/cuda/policy/policy.hpp"

namespace natten::cuda {

// One warp has 16 rows of the owned tile, and all columns of its group.
template <class Atom, int kOwn, int kHeadDim>
struct TensorCoreMath {
  static constexpr int kWarps = kOwn / 16;
  static constexpr int kColumnGroups = column_groups(kHeadDim);
  static constexpr int kScoreThreads = 32 * kWarps;
  static constexpr int kThreads = kScoreThreads * kColumnGroups;
  // Blocks of 16 columns and of 32 bytes of K: what one matrix load of four 8x8 matrices brings.
  static constexpr int kBlockK = 32 / int(sizeof(typename MMA_Traits<Atom>::ValTypeA));
  using Mma = TiledMMA<MMA_Atom<Atom>, Layout<Shape<Int<kWarps>, _1, _1>>, Tile<Int<kOwn>, _16, Int<kBlockK>>>;
  using MmaTransposed = TiledMMA<MMA_Atom<Atom>, Layout<Shape<Int<kWarps>, Int<kColumnGroups>, _1>>,
                                 Tile<Int<kOwn>, Int<16 * kColumnGroups>, Int<kBlockK>>>;

  using CopyOwn = SM75_U32x4_LDSM_N;
  using CopyStreamed = SM75_U32x4_LDSM_N;
  using CopyTransposed = SM75_U16x8_LDSM_T;
  static constexpr bool kOperandInRegisters = true;
  using RowOrder = void;  // rows of the streamed tile as they come

  // Lanes that differ in these bits hold other columns of the same rows.
  static constexpr int kRowLanes = 3;

  // An accumulator ((2, 2), M, N) as (rows, columns).
  template <class Layout>
  CUTE_DEVICE static auto rows_by_columns(Layout const& l) {
    return make_layout(make_layout(get<0, 1>(l), get<1>(l)), make_layout(get<0, 0>(l), get<2>(l)));
  }
  template <class Layout>
  CUTE_DEVICE static auto transposed_rows_by_columns(Layout const& l) {
    return rows_by_columns(l);
  }
};

}  // namespace natten::cuda
