// SPDX-License-Identifier: MIT
// Products by fused multiply-adds in float32, for architectures and types without tensor cores.
#pragma once

#include <cute/atom/mma_atom.hpp>

#include "natten/cuda/policy/policy.hpp"

namespace natten::cuda {

// d += a . b over four elements that lie together in shared memory.
struct SimtDot {
  using DRegisters = float[1];
  using ARegisters = float[4];
  using BRegisters = float[4];
  using CRegisters = float[1];
  CUTE_HOST_DEVICE static void fma(float& d, float a0, float a1, float a2, float a3, float b0, float b1, float b2,
                                   float b3, float c) {
    d = a3 * b3 + (a2 * b2 + (a1 * b1 + (a0 * b0 + c)));
  }
};

// Four neighbouring columns d += a b, b being stored row by row.
struct SimtRow {
  using DRegisters = float[4];
  using ARegisters = float[1];
  using BRegisters = float[4];
  using CRegisters = float[4];
  CUTE_HOST_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3, float a, float b0, float b1, float b2,
                                   float b3, float c0, float c1, float c2, float c3) {
    d0 = a * b0 + c0;
    d1 = a * b1 + c1;
    d2 = a * b2 + c2;
    d3 = a * b3 + c3;
  }
};

// Threads of a group: kRowThreads x 8, the columns running fastest, so that the 8 threads of a row share a warp.
template <class Element, int kOwn, int kHeadDim>
struct SimtMath {
  static constexpr int kColumnThreads = 8;
  static constexpr int kRowThreads = kOwn < 16 ? kOwn : 16;
  static constexpr int kColumnGroups = column_groups(kHeadDim);
  static constexpr int kScoreThreads = kRowThreads * kColumnThreads;
  static constexpr int kThreads = kScoreThreads * kColumnGroups;
  using Threads = Layout<Shape<Int<kRowThreads>, Int<kColumnThreads>, _1>, Stride<Int<kColumnThreads>, _1, _0>>;
  using Mma = TiledMMA<MMA_Atom<SimtDot>, Threads>;
  using MmaTransposed =
      TiledMMA<MMA_Atom<SimtRow>, Layout<Shape<Int<kRowThreads>, Shape<Int<kColumnThreads>, Int<kColumnGroups>>, _1>,
                                         Stride<Int<kColumnThreads>, Stride<_1, Int<kScoreThreads>>, _0>>>;

  using FourElements = uint_bit_t<4 * sizeof_bits_v<Element>>;
  using CopyOwn = UniversalCopy<FourElements>;
  using CopyStreamed = UniversalCopy<FourElements>;
  using CopyTransposed = UniversalCopy<FourElements>;
  using CopyScores = UniversalCopy<Element>;
  static constexpr bool kOperandInRegisters = false;
  using RowOrder = void;

  static constexpr int kRowLanes = kColumnThreads - 1;

  template <class Layout>
  CUTE_DEVICE static auto rows_by_columns(Layout const& l) {  // (1, M, N)
    return make_layout(get<1>(l), get<2>(l));
  }
  template <class Layout>
  CUTE_DEVICE static auto transposed_rows_by_columns(Layout const& l) {  // (4, M, N)
    return make_layout(get<1>(l), make_layout(get<0>(l), get<2>(l)));
  }
};

}  // namespace natten::cuda

namespace cute {

template <>
struct MMA_Traits<natten::cuda::SimtDot> {
  using ValTypeD = float;
  using ValTypeA = float;
  using ValTypeB = float;
  using ValTypeC = float;
  using Shape_MNK = Shape<_1, _1, _4>;
  using ThrID = Layout<_1>;
  using ALayout = Layout<Shape<_1, _4>, Stride<_0, _1>>;
  using BLayout = Layout<Shape<_1, _4>, Stride<_0, _1>>;
  using CLayout = Layout<Shape<_1, _1>, Stride<_0, _0>>;
};

template <>
struct MMA_Traits<natten::cuda::SimtRow> {
  using ValTypeD = float;
  using ValTypeA = float;
  using ValTypeB = float;
  using ValTypeC = float;
  using Shape_MNK = Shape<_1, _4, _1>;
  using ThrID = Layout<_1>;
  using ALayout = Layout<Shape<_1, _1>, Stride<_0, _0>>;
  using BLayout = Layout<Shape<_1, _4>, Stride<_0, _1>>;
  using CLayout = Layout<Shape<_1, _4>, Stride<_0, _1>>;
};

}  // namespace cute
