// SPDX-License-Identifier: MIT
// Gradients straight from their definition: a warp a query (gradient of the query), a key (of key and value), or an
// entry of the bias table. Everything is gathered, and weights are found anew for each: no atomics, the same bits in
// every run.
#pragma once

#include "natten/cuda/collective/pair.hpp"
#include "natten/cuda/kernel/delta.hpp"

namespace natten::cuda {

// What the kernels of the backward pass share. With P the attention weights and dP = dO V^T, the gradient of the logits
// is dS = P (dP - delta).
template <class Element>
struct NaiveGradient {
  using Real = Accumulator<Element>;

  struct Params {
    BackwardArguments arguments;
    TensorRef delta;
    Partition queries, keys;  // into single tokens
    std::int64_t additional_items;
    Logits<Element> logits;
  };

  static Params make_params(BackwardArguments const& a, LaunchContext const& context) {
    Problem const& problem = a.problem;
    Params p{};
    p.arguments = a;
    p.delta = delta_tensor(problem, context.workspace);
    p.queries = Partition::make(problem, Side::kQuery, TileShapes{});
    p.keys = Partition::make(problem, Side::kKey, TileShapes{});
    p.additional_items = problem.batch * problem.heads_kv * problem.additional_keys;
    p.logits = Logits<Element>::make(a);
    return p;
  }

  struct QueryRow {
    Element const* query;
    Element const* d_output;
    Real lse, delta;
  };

  // The queries of one head of one sample. view(tensor, T) is a view of a tensor of them.
  struct Queries {
    TokenView query, d_output, lse, delta;

    template <class ViewOf>
    CUTE_DEVICE static Queries make(Params const& p, ViewOf const& view) {
      BackwardArguments const& a = p.arguments;
      return {view(a.query, Element{}), view(a.d_output, Element{}), view(a.lse, Real{}), view(p.delta, Real{})};
    }
    CUTE_DEVICE QueryRow at(int const (&x)[kMaxRank]) const {
      return {row_of<Element const>(query, x), row_of<Element const>(d_output, x), *row_of<Real const>(lse, x),
              *row_of<Real const>(delta, x)};
    }
  };

  // In the dilation group of `own`: `x` are positions.
  CUTE_DEVICE static Queries queries_in_group(Params const& p, Own const& own, int head) {
    return Queries::make(p, [&](TensorRef const& tensor, auto element) {
      return view_of<Side::kQuery, decltype(element)>(tensor, p.arguments.problem, own, head);
    });
  }
  // All of a sample's: `x` are coordinates in the tensor.
  CUTE_DEVICE static Queries all_queries(Params const& p, Own const& own, int head) {
    return Queries::make(
        p, [&](TensorRef const& tensor, auto element) { return plain_view_of<decltype(element)>(tensor, own, head); });
  }
  CUTE_DEVICE static void box_of_queries(Problem const& problem, Interval (&box)[kMaxRank]) {
    for (int a = 0; a < kMaxRank; ++a) box[a] = {0, problem.axes[a].query_extent};
  }

  struct Weight {
    Real probability;  // P
    Real d_logit;      // dS
  };

  CUTE_DEVICE static Weight weight(QueryRow const& row, Real logit, Element const* value, int head_dim_value) {
    // A row without weights has no gradient; exp(-inf - -inf) would be NaN.
    if (row.lse == -kInfinity<Real>) return {0, 0};
    Real const probability = std::exp(logit - row.lse);
    return {probability, probability * (Warps::dot(row.d_output, value, head_dim_value) - row.delta)};
  }
};

template <class Element>
struct NaiveGradQuery : NaiveGradient<Element> {
  using Base = NaiveGradient<Element>;
  using typename Base::Params;
  using Real = typename Base::Real;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    Warps::for_each_row(p.queries.items, [&](std::int64_t item) {
      Token token;
      if (!token.locate<Side::kQuery>(p.queries, p.arguments.problem, item)) return;
      for (int begin = 0; begin < p.arguments.problem.head_dim; begin += ColumnSums<Element>::kColumns) {
        differentiate(p, token, begin);
      }
    });
  }

 private:
  CUTE_DEVICE static void differentiate(Params const& p, Token const& token, int begin) {
    BackwardArguments const& a = p.arguments;
    Problem const& problem = a.problem;
    Own const& own = token.own;
    int const head_kv = own.head / problem.group_size();
    auto const row = Base::queries_in_group(p, own, own.head).at(own.origin);
    TokenView const keys = view_of<Side::kKey, Element>(a.key, problem, own, head_kv);
    TokenView const values = view_of<Side::kKey, Element>(a.value, problem, own, head_kv);

    ColumnSums<Element> d_query(begin, problem.head_dim);
    for_each_of(token.others, [&](int const(&x)[kMaxRank]) {
      Element const* const key = row_of<Element const>(keys, x);
      Real const logit = p.logits(row.query, key, own.head, own.origin, x);
      Element const* const value = row_of<Element const>(values, x);
      d_query.add(Base::weight(row, logit, value, problem.head_dim_value).d_logit, key);
    });
    TokenView const additional_keys = plain_view_of<Element>(a.additional_keys, own, head_kv);
    TokenView const additional_values = plain_view_of<Element>(a.additional_values, own, head_kv);
    for (int j = 0; j < problem.additional_keys; ++j) {
      Element const* const key = additional_keys.token<Element const>(0, 0, j);
      Element const* const value = additional_values.token<Element const>(0, 0, j);
      d_query.add(Base::weight(row, p.logits(row.query, key), value, problem.head_dim_value).d_logit, key);
    }
    TokenView const result = view_of<Side::kQuery, Element>(a.d_query, problem, own, own.head);
    d_query.store(row_of<Element>(result, own.origin), p.logits.scale);
  }
};

// Of the keys of the grid, and of the additional ones behind them.
template <class Element>
struct NaiveGradKeyValue : NaiveGradient<Element> {
  using Base = NaiveGradient<Element>;
  using typename Base::Params;
  using typename Base::QueryRow;
  using Real = typename Base::Real;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    Warps::for_each_row(p.keys.items + p.additional_items, [&](std::int64_t item) {
      if (item < p.keys.items) differentiate_key(p, item);
      else differentiate_additional(p, item - p.keys.items);
    });
  }

 private:
  struct Pair {
    Element const* key;
    Element const* value;
    Element* d_key;
    Element* d_value;
  };

  CUTE_DEVICE static void differentiate_key(Params const& p, std::int64_t item) {
    BackwardArguments const& a = p.arguments;
    Token token;
    if (!token.locate<Side::kKey>(p.keys, a.problem, item)) return;
    Own const& own = token.own;
    auto const row = [&](TensorRef const& tensor) {
      return row_of<Element>(view_of<Side::kKey, Element>(tensor, a.problem, own, own.head), own.origin);
    };
    Pair const pair{row(a.key), row(a.value), row(a.d_key), row(a.d_value)};
    gather(p, own, pair, [&](int head, auto const& add) {
      auto const queries = Base::queries_in_group(p, own, head);
      for_each_of(token.others, [&](int const(&x)[kMaxRank]) {
        QueryRow const row = queries.at(x);
        add(row, p.logits(row.query, pair.key, head, x, own.origin));
      });
    });
  }

  CUTE_DEVICE static void differentiate_additional(Params const& p, std::int64_t item) {
    BackwardArguments const& a = p.arguments;
    Own own;
    own.locate_additional(p.keys, a.problem.additional_keys, item);
    auto const row = [&](TensorRef const& tensor) {
      return row_of<Element>(plain_view_of<Element>(tensor, own, own.head), own.origin);
    };
    Pair const pair{row(a.additional_keys), row(a.additional_values), row(a.d_additional_keys),
                    row(a.d_additional_values)};
    Interval box[kMaxRank];
    Base::box_of_queries(a.problem, box);
    gather(p, own, pair, [&](int head, auto const& add) {
      auto const queries = Base::all_queries(p, own, head);
      for_each_of(box, [&](int const(&x)[kMaxRank]) {
        QueryRow const row = queries.at(x);
        add(row, p.logits(row.query, pair.key));
      });
    });
  }

  // for_each_query(head, add) calls add(row, logit) for every query of the head that attends to the key.
  template <class ForEachQuery>
  CUTE_DEVICE static void gather(Params const& p, Own const& own, Pair const& pair,
                                 ForEachQuery const& for_each_query) {
    Problem const& problem = p.arguments.problem;
    int const group_size = problem.group_size();
    int const columns = max(problem.head_dim, problem.head_dim_value);
    for (int begin = 0; begin < columns; begin += ColumnSums<Element>::kColumns) {
      ColumnSums<Element> d_key(begin, problem.head_dim), d_value(begin, problem.head_dim_value);
      for (int head = own.head * group_size; head < (own.head + 1) * group_size; ++head) {
        for_each_query(head, [&](QueryRow const& row, Real logit) {
          auto const weight = Base::weight(row, logit, pair.value, problem.head_dim_value);
          d_key.add(weight.d_logit, row.query);
          d_value.add(weight.probability, row.d_output);
        });
      }
      d_key.store(pair.d_key, p.logits.scale);
      d_value.store(pair.d_value, Real(1));
    }
  }
};

// Of the bias table: every query has at most one key that lies at an entry.
template <class Element>
struct NaiveGradBias : NaiveGradient<Element> {
  using Base = NaiveGradient<Element>;
  using typename Base::Params;
  using Real = typename Base::Real;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    BackwardArguments const& a = p.arguments;
    Problem const& problem = a.problem;
    Warps::for_each_row(std::int64_t{problem.heads} * p.logits.bias.entries, [&](std::int64_t item) {
      int displacement[kMaxRank];  // from the query's position to the key's
      std::int64_t rest = item;
      for (int i = kMaxRank - 1; i >= 0; --i) {
        int const kernel_size = problem.axes[i].kernel_size;
        displacement[i] = static_cast<int>(rest % (2 * kernel_size - 1)) - (kernel_size - 1);
        rest /= 2 * kernel_size - 1;
      }
      Own own;
      own.head = static_cast<int>(rest);
      Interval box[kMaxRank];
      Base::box_of_queries(problem, box);
      auto const has_key = [&](int i, int x) {
        Axis const& axis = problem.axes[i];
        int const token = axis.query_origin + x;
        int const position = token / axis.dilation;
        return axis.group(token % axis.dilation).window(position).contains(position + displacement[i]);
      };
      Real sum = 0;
      for (own.batch = 0; own.batch < problem.batch; ++own.batch) {
        auto const queries = Base::all_queries(p, own, own.head);
        int const head_kv = own.head / problem.group_size();
        TokenView const keys = plain_view_of<Element>(a.key, own, head_kv);
        TokenView const values = plain_view_of<Element>(a.value, own, head_kv);
        auto const add = [&](int const(&x)[kMaxRank]) {
          int y[kMaxRank];
          for (int i = 0; i < kMaxRank; ++i) {
            Axis const& axis = problem.axes[i];
            y[i] = axis.query_origin + x[i] + displacement[i] * axis.dilation - axis.key_origin;
          }
          auto const row = queries.at(x);
          Real const logit = p.logits(row.query, row_of<Element const>(keys, y)) + p.logits.rpb[item];
          sum += Base::weight(row, logit, row_of<Element const>(values, y), problem.head_dim_value).d_logit;
        };
        for_each_of(box, add, has_key);
      }
      if (Warps::lane() == 0) static_cast<Real*>(a.d_rpb)[item] = sum;
    });
  }
};

// Delta.
template <class Element>
std::int64_t naive_backward_workspace(BackwardArguments const& arguments, LaunchContext const&) {
  return make_delta_params<Element>(arguments, nullptr).rows * std::int64_t(sizeof(Accumulator<Element>));
}

template <class Element, class Launch>
void run_naive_backward(BackwardArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  auto const delta = make_delta_params<Element>(arguments, context.workspace);
  launch(Delta<Element>{}, delta, Delta<Element>::blocks(delta, context), 0);
  auto const params = NaiveGradient<Element>::make_params(arguments, context);
  auto const differentiate = [&](auto kernel, std::int64_t rows) {
    launch(kernel, params, Warps::blocks(rows, context), 0);
  };
  differentiate(NaiveGradQuery<Element>{}, params.queries.items);
  differentiate(NaiveGradKeyValue<Element>{}, params.keys.items + params.additional_items);
  if (arguments.d_rpb != nullptr) {
    differentiate(NaiveGradBias<Element>{}, std::int64_t{arguments.problem.heads} * params.logits.bias.entries);
  }
}

}  // namespace natten::cuda
