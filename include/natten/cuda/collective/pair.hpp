// SPDX-License-Identifier: MIT
// Attention one query and one key at a time: what the kernels without tiles share.
#pragma once

#include <cmath>
#include <limits>

#include "natten/cuda/collective/block.hpp"
#include "natten/cuda/collective/warp.hpp"

namespace natten::cuda {

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// visit(p) for every p of a box that keep(axis, p[axis]) leaves.
template <class Visit, class Keep>
CUTE_DEVICE void for_each_of(Interval const (&box)[kMaxRank], Visit const& visit, Keep const& keep) {
  int p[kMaxRank];
  for (p[0] = box[0].begin; p[0] < box[0].end; ++p[0]) {
    if (!keep(0, p[0])) continue;
    for (p[1] = box[1].begin; p[1] < box[1].end; ++p[1]) {
      if (!keep(1, p[1])) continue;
      for (p[2] = box[2].begin; p[2] < box[2].end; ++p[2]) {
        if (keep(2, p[2])) visit(p);
      }
    }
  }
}
template <class Visit>
CUTE_DEVICE void for_each_of(Interval const (&box)[kMaxRank], Visit const& visit) {
  for_each_of(box, visit, [](int, int) { return true; });
}

template <class T>
CUTE_DEVICE T* row_of(TokenView const& view, int const (&p)[kMaxRank]) {
  return view.token<T>(p[0], p[1], p[2]);
}

// A token, and the positions of its dilation group that it attends to, or that attend to it.
struct Token {
  Own own;  // a tile of this one token: own.origin is its position
  Interval others[kMaxRank];
  double missing = 0;  // keys that a query with boundary "zeros" counts and does not have

  // Whether `item` of a partition into single tokens is one: smaller dilation groups have some less.
  template <Side kSide>
  CUTE_DEVICE bool locate(Partition const& partition, Problem const& problem, std::int64_t item) {
    own.locate(partition, item);
    int counted[kMaxRank], present[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      Group const group = problem.axes[a].group(own.group[a]);
      Interval const tokens = tile_side(group, kSide);
      own.origin[a] += tokens.begin;
      if (own.origin[a] >= tokens.end) return false;
      if (kSide == Side::kQuery) {
        others[a] = group.window(own.origin[a]);
        counted[a] = group.counted(own.origin[a]);
        present[a] = others[a].size();
      } else {
        others[a] = group.inverse(own.origin[a]);
      }
    }
    if (kSide == Side::kQuery) missing = missing_keys(counted, present);
    return true;
  }
};

// The logits of a problem.
template <class Element>
struct Logits {
  using Real = Accumulator<Element>;

  int head_dim;
  Real scale;
  Real const* rpb;
  BiasIndex bias;

  template <class Arguments>
  static Logits make(Arguments const& a) {
    Problem const& problem = a.problem;
    return {problem.head_dim, static_cast<Real>(problem.scale), static_cast<Real const*>(a.rpb),
            BiasIndex::make(problem)};
  }

  CUTE_DEVICE Real operator()(Element const* query, Element const* key) const {
    return rounded_product(scale, Warps::dot(query, key, head_dim));
  }
  // `from` and `to`: positions of the query and the key.
  CUTE_DEVICE Real operator()(Element const* query, Element const* key, int head, int const (&from)[kMaxRank],
                              int const (&to)[kMaxRank]) const {
    Real const logit = (*this)(query, key);
    if (rpb == nullptr) return logit;
    int const displacement[kMaxRank] = {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
    return logit + rpb[std::int64_t{head} * bias.entries + bias.corner + bias.of_position(displacement)];
  }
};

}  // namespace natten::cuda
