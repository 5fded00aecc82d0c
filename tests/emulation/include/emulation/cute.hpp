// SPDX-License-Identifier: MIT
// CuTe's warp-wide atoms on the CPU, all of them by what their traits say: which thread holds which element. Atoms of
// one thread are C++ already. Found by argument-dependent lookup, and more specialised than what CuTe calls otherwise.
// Included before everything else (-include).
#pragma once

#include <cute/tensor.hpp>  // before the atoms, which include it in a circle

#include <array>

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "emulation/builtins.hpp"

namespace natten::emulation {

// Places of each lane's values: index in the operand, by a layout (thread, value).
template <int kValues>
using Places = std::array<std::array<int, kValues>, kLanes>;

// A lane is thread `% size(ThrID)` of the atom of group `/ size(ThrID)`, in a numbering of lanes by ThrID.
template <class ThrID>
constexpr int thread_of(int lane) {
  auto const lanes = cute::make_layout(ThrID{}, cute::complement(ThrID{}, cute::Int<kLanes>{}));
  for (int i = 0; i < kLanes; ++i) {
    if (int(lanes(i)) == lane) return i;
  }
  return -1;
}

template <class ThrID, class Layout, int kGroupStride, int kBegin>
constexpr auto make_places() {
  constexpr int kThreads = decltype(cute::size(ThrID{}))::value;
  constexpr int kValues = decltype(cute::size<1>(Layout{}))::value;
  Places<kValues> places{};
  for (int lane = 0; lane < kLanes; ++lane) {
    int const thread = thread_of<ThrID>(lane);
    for (int v = 0; v < kValues; ++v) {
      places[lane][v] = thread / kThreads * kGroupStride + kBegin + int(Layout{}(thread % kThreads, v));
    }
  }
  return places;
}

template <class ThrID, class Layout, int kGroupStride = 0, int kBegin = 0>
inline constexpr auto kPlaces = make_places<ThrID, Layout, kGroupStride, kBegin>();

// A factor as the tensor core reads it: of TF32 the low 13 bits do not count.
template <class T>
float factor(T const& x) {
  return float(x);
}
inline float factor(cutlass::tfloat32_t const& x) {
  std::uint32_t const bits = x.raw() & 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class Fragment, std::size_t kValues>
void give_fragment(Fragment const& fragment, std::array<int, kValues> const& places) {
  static_assert(decltype(cute::size(fragment))::value == kValues);
  float values[kValues];
  for (int v = 0; v < int(kValues); ++v) values[v] = factor(fragment(v));
  give(sizeof(float), kValues, places.data(), values);
}

}  // namespace natten::emulation

namespace cute {

template <class Op, class... Args, class TD, class LD, class TA, class LA, class TB, class LB, class TC, class LC,
          enable_if_t<(decltype(size(typename MMA_Traits<Op, Args...>::ThrID{}))::value > 1), int> = 0>
void mma_unpack(MMA_Traits<Op, Args...> const&, Tensor<TD, LD>& d, Tensor<TA, LA> const& a, Tensor<TB, LB> const& b,
                Tensor<TC, LC> const& c) {
  namespace emulation = natten::emulation;
  using Traits = MMA_Traits<Op, Args...>;
  using ThrID = typename Traits::ThrID;
  using Shape = typename Traits::Shape_MNK;
  constexpr emulation::Product kProduct{decltype(size<0>(Shape{}))::value, decltype(size<1>(Shape{}))::value,
                                        decltype(size<2>(Shape{}))::value,
                                        emulation::kLanes / decltype(size(ThrID{}))::value};
  constexpr int kSize = kProduct.size();
  int const lane = emulation::lane();
  emulation::give_fragment(a, emulation::kPlaces<ThrID, typename Traits::ALayout, kSize>[lane]);
  emulation::give_fragment(b, emulation::kPlaces<ThrID, typename Traits::BLayout, kSize, kProduct.begin_b()>[lane]);
  emulation::give_fragment(c, emulation::kPlaces<ThrID, typename Traits::CLayout, kSize, kProduct.begin_c()>[lane]);
  emulation::meet_and_multiply(kProduct);
  auto const& places = emulation::kPlaces<ThrID, typename Traits::CLayout, kProduct.m * kProduct.n>[lane];
  float values[decltype(size(d))::value];
  emulation::take(sizeof(float), decltype(size(d))::value, places.data(), values);
  for (int v = 0; v < size(d); ++v) d(v) = typename TD::value_type(values[v]);
}

// ldmatrix, of 1, 2 or 4 matrices: 8 lanes name the rows of each.
template <class Op, class... Args, class TS, class LS, class TD, class LD,
          enable_if_t<(decltype(size(typename Copy_Traits<Op, Args...>::ThrID{}))::value > 1), int> = 0>
void copy_unpack(Copy_Traits<Op, Args...> const&, Tensor<TS, LS> const& source, Tensor<TD, LD>& destination) {
  namespace emulation = natten::emulation;
  using Traits = Copy_Traits<Op, Args...>;
  using ThrID = typename Traits::ThrID;
  using Value = typename TS::value_type;
  static_assert(sizeof(Value) == sizeof(typename TD::value_type));
  using Source = decltype(recast_layout<uint1_t, Value>(typename Traits::SrcLayout{}));
  using Destination = decltype(recast_layout<uint1_t, Value>(typename Traits::DstLayout{}));
  constexpr int kRowBytes = 16;
  constexpr int kGiven = kRowBytes / int(sizeof(Value));
  constexpr int kTaken = decltype(size<1>(Destination{}))::value;
  constexpr int kRows = emulation::kLanes * kTaken / kGiven;
  static_assert(decltype(size(source))::value == kGiven && kRows % 8 == 0);
  int const lane = emulation::lane();
  if (lane < kRows) {
    emulation::check_shared(&source(0), kRowBytes, "ldmatrix");
    if (&source(kGiven - 1) != &source(0) + kGiven - 1) throw emulation::Error("ldmatrix: a row is not contiguous");
    Value row[kGiven];
    for (int v = 0; v < kGiven; ++v) row[v] = source(v);
    emulation::give(sizeof(Value), kGiven, emulation::kPlaces<ThrID, Source>[lane].data(), row);
  }
  emulation::meet("ldmatrix", 0xffffffffu);
  Value values[kTaken];
  emulation::take(sizeof(Value), kTaken, emulation::kPlaces<ThrID, Destination>[lane].data(), values);
  for (int v = 0; v < kTaken; ++v) destination(v) = values[v];
}

}  // namespace cute
