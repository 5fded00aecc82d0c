// SPDX-License-Identifier: MIT
// The unfused ops straight from their definition (UnfusedArguments), for problems that no kernel with tiles takes: a warp a
// row.
#pragma once

#include "natten/cuda/collective/pair.hpp"
#include "natten/cuda/collective/weights.hpp"

namespace natten::cuda {

template <class Element, Side kSide>
struct NaiveUnfused {
  using Real = Accumulator<Element>;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  struct Params {
    UnfusedArguments arguments;
    Partition rows;
    BiasIndex bias;
    SlotIndex slots;
  };

  static Params make_params(UnfusedArguments const& a) {
    return {a, Partition::make(a.problem, kSide, TileShapes{}), BiasIndex::make(a.problem), SlotIndex::make(a.problem)};
  }

 protected:
  // visit(token), for the rows of the calling warp.
  template <class Visit>
  CUTE_DEVICE static void for_each_token(Params const& p, Visit const& visit) {
    Warps::for_each_row(p.rows.items, [&](std::int64_t item) {
      Token token;
      if (token.template locate<kSide>(p.rows, p.arguments.problem, item)) visit(token);
    });
  }

  template <Side kOfSide>
  CUTE_DEVICE static TokenView view(Params const& p, TensorRef const& tensor, Own const& own, int head) {
    return view_of<kOfSide, Element>(tensor, p.arguments.problem, own, head);
  }

  // The weight of the query and the key at two positions.
  CUTE_DEVICE static Element* weight(Params const& p, Own const& own, TokenView const& weights,
                                     int const (&query)[kMaxRank], int const (&key)[kMaxRank]) {
    Problem const& problem = p.arguments.problem;
    return weights.token<Element>(0, 0, 0) + weight_offset<Side::kQuery>(weights, p.slots, problem, own.group, query) +
           weight_offset<Side::kKey>(weights, p.slots, problem, own.group, key);
  }

  // row += ..., as many columns at a time as a warp takes: add_all(sums) adds rows to them.
  template <class AddAll>
  CUTE_DEVICE static void store_sum(Params const& p, Element* row, AddAll const& add_all) {
    int const head_dim = p.arguments.problem.head_dim;
    for (int begin = 0; begin < head_dim; begin += ColumnSums<Element>::kColumns) {
      ColumnSums<Element> sums(begin, head_dim);
      add_all(sums);
      sums.store(row, Real(1));
    }
  }
};

template <class Element>
struct NaiveQk : NaiveUnfused<Element, Side::kQuery> {
  using Base = NaiveUnfused<Element, Side::kQuery>;
  using typename Base::Params;
  using typename Base::Real;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    UnfusedArguments const& a = p.arguments;
    Base::for_each_token(p, [&](Token const& token) {
      Own const& own = token.own;
      auto const& query = own.origin;
      Element const* const row = row_of<Element>(Base::template view<Side::kQuery>(p, a.query, own, own.head), query);
      TokenView const keys = Base::template view<Side::kKey>(p, a.key, own, own.head / a.problem.group_size());
      TokenView const weights = Base::template view<Side::kQuery>(p, a.weights, own, own.head);
      Real const* const rpb = static_cast<Real const*>(a.rpb);
      for_each_of(token.others, [&](int const(&key)[kMaxRank]) {
        Real logit = Warps::dot(row, row_of<Element const>(keys, key), a.problem.head_dim);
        if (rpb != nullptr) {
          int const displacement[kMaxRank] = {key[0] - query[0], key[1] - query[1], key[2] - query[2]};
          logit += rpb[std::int64_t{own.head} * p.bias.entries + p.bias.corner + p.bias.of_position(displacement)];
        }
        if (Warps::lane() == 0) *Base::weight(p, own, weights, query, key) = static_cast<Element>(logit);
      });
      clear_unused(row_of<Element>(weights, query), p.slots, a.problem, own.group, query,
                   static_cast<Element>(static_cast<Real>(a.unused)));
    });
  }
};

template <class Element>
struct NaiveAv : NaiveUnfused<Element, Side::kQuery> {
  using Base = NaiveUnfused<Element, Side::kQuery>;
  using typename Base::Params;
  using typename Base::Real;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    UnfusedArguments const& a = p.arguments;
    Base::for_each_token(p, [&](Token const& token) {
      Own const& own = token.own;
      TokenView const keys = Base::template view<Side::kKey>(p, a.key, own, own.head / a.problem.group_size());
      TokenView const weights = Base::template view<Side::kQuery>(p, a.weights, own, own.head);
      Element* const row = row_of<Element>(Base::template view<Side::kQuery>(p, a.query, own, own.head), own.origin);
      Base::store_sum(p, row, [&](ColumnSums<Element>& sums) {
        for_each_of(token.others, [&](int const(&key)[kMaxRank]) {
          Real const weight = static_cast<Real>(*Base::weight(p, own, weights, own.origin, key));
          sums.add(weight, row_of<Element const>(keys, key));
        });
      });
    });
  }
};

template <class Element>
struct NaiveAvTransposed : NaiveUnfused<Element, Side::kKey> {
  using Base = NaiveUnfused<Element, Side::kKey>;
  using typename Base::Params;
  using typename Base::Real;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    UnfusedArguments const& a = p.arguments;
    int const group_size = a.problem.group_size();
    Base::for_each_token(p, [&](Token const& token) {
      Own const& own = token.own;
      Element* const row = row_of<Element>(Base::template view<Side::kKey>(p, a.key, own, own.head), own.origin);
      Base::store_sum(p, row, [&](ColumnSums<Element>& sums) {
        for (int head = own.head * group_size; head < (own.head + 1) * group_size; ++head) {
          TokenView const queries = Base::template view<Side::kQuery>(p, a.query, own, head);
          TokenView const weights = Base::template view<Side::kQuery>(p, a.weights, own, head);
          for_each_of(token.others, [&](int const(&query)[kMaxRank]) {
            Real const weight = static_cast<Real>(*Base::weight(p, own, weights, query, own.origin));
            sums.add(weight, row_of<Element const>(queries, query));
          });
        }
      });
    });
  }
};

template <class Kernel, class Launch>
void run_naive_unfused(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  auto const params = Kernel::make_params(arguments);
  launch(Kernel{}, params, Warps::blocks(params.rows.items, context), 0);
}

template <class Element, class Launch>
void run_naive_qk(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  run_naive_unfused<NaiveQk<Element>>(arguments, context, launch);
}
template <class Element, class Launch>
void run_naive_av(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  run_naive_unfused<NaiveAv<Element>>(arguments, context, launch);
}
template <class Element, class Launch>
void run_naive_av_transposed(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  run_naive_unfused<NaiveAvTransposed<Element>>(arguments, context, launch);
}

}  // namespace natten::cuda
