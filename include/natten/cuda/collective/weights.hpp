// SPDX-License-Identifier: MIT
// Attention weights in memory (UnfusedArguments): where the weight of a query and a key stands.
#pragma once

#include "natten/cuda/collective/block.hpp"
#include "natten/cuda/collective/warp.hpp"

namespace natten::cuda {

// The slot of a key in a window is of_position(key - the window's first key).
struct SlotIndex {
  int stride[kMaxRank];
  int count;

  static SlotIndex make(Problem const& problem) {
    SlotIndex index;
    index.count = 1;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      index.stride[a] = index.count;
      index.count *= problem.axes[a].kernel_size;
    }
    return index;
  }

  CUTE_DEVICE int of_position(int const (&p)[kMaxRank]) const {
    return p[0] * stride[0] + p[1] * stride[1] + p[2] * stride[2];
  }
};

// From the first of a head's weights, in elements: what the query at one position and the key at another add up to is the
// weight of the two.
template <Side kSide>
CUTE_DEVICE std::int64_t weight_offset(TokenView const& weights, SlotIndex const& slots, Problem const& problem,
                                       int const (&group)[kMaxRank], int const (&p)[kMaxRank]) {
  if constexpr (kSide == Side::kKey) return slots.of_position(p);
  std::int64_t offset = 0;
  int begin[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    offset += p[a] * weights.stride[a];
    begin[a] = problem.axes[a].group(group[a]).window(p[a]).begin;
  }
  return offset - slots.of_position(begin);
}

// Fills the slots of a query that have no key: with 0 those that boundary "zeros" counts, the others with `unused`. The
// lanes of a warp share the work; `row` is the first slot.
template <class Element>
CUTE_DEVICE void clear_unused(Element* row, SlotIndex const& slots, Problem const& problem,
                              int const (&group)[kMaxRank], int const (&p)[kMaxRank], Element unused) {
  int present[kMaxRank], counted[kMaxRank];
  bool is_full = true;
  for (int a = 0; a < kMaxRank; ++a) {
    Group const axis = problem.axes[a].group(group[a]);
    present[a] = axis.window(p[a]).size();
    counted[a] = axis.counted(p[a]);
    is_full = is_full && present[a] == problem.axes[a].kernel_size;
  }
  if (is_full) return;
  for (int slot = Warps::lane(); slot < slots.count; slot += Warps::kLanes) {
    bool has_key = true, is_counted = true;
    for (int a = 0, rest = slot; a < kMaxRank; rest %= slots.stride[a], ++a) {
      int const t = rest / slots.stride[a];
      has_key = has_key && t < present[a];
      is_counted = is_counted && t < counted[a];
    }
    if (!has_key) row[slot] = is_counted ? Element(0) : unused;
  }
}

}  // namespace natten::cuda
