// SPDX-License-Identifier: MIT
// Attention straight from its definition, for problems that no fused kernel takes: a warp a query.
#pragma once

#include "natten/cuda/collective/pair.hpp"

namespace natten::cuda {

// The softmax of a query, key by key: the weights so far are relative to the largest logit so far.
template <class Element>
class OnlineSoftmax {
 public:
  using Real = Accumulator<Element>;

  // Of the values' columns from `begin` on.
  CUTE_DEVICE OnlineSoftmax(int begin, int size) : sums_(begin, size) {}

  CUTE_DEVICE void add(Real logit, Element const* value) {
    if (logit == -kInfinity<Real>) return;
    raise_maximum(logit);
    Real const weight = std::exp(logit - maximum_);
    denominator_ += weight;
    sums_.add(weight, value);
  }
  // `count` keys with logit 0 and value 0.
  CUTE_DEVICE void add_zeros(double count) {
    if (count == 0) return;
    raise_maximum(0);
    denominator_ += static_cast<Real>(count) * std::exp(-maximum_);
  }

  // A row without keys is 0, and its LSE -inf.
  CUTE_DEVICE void store_to(Element* output) {
    sums_.store(output, denominator_ == 0 ? Real(0) : Real(1) / denominator_);
  }
  CUTE_DEVICE Real lse() const { return maximum_ + std::log(denominator_); }

 private:
  CUTE_DEVICE void raise_maximum(Real logit) {
    if (!(logit > maximum_)) return;
    Real const factor = std::exp(maximum_ - logit);
    sums_.scale(factor);
    denominator_ *= factor;
    maximum_ = logit;
  }

  ColumnSums<Element> sums_;
  Real maximum_ = -kInfinity<Real>;
  Real denominator_ = 0;
};

template <class Element>
struct NaiveForward {
  using Real = Accumulator<Element>;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  struct Params {
    ForwardArguments arguments;
    Partition queries;
    Logits<Element> logits;
  };

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    Warps::for_each_row(p.queries.items, [&](std::int64_t item) {
      Token token;
      if (!token.locate<Side::kQuery>(p.queries, p.arguments.problem, item)) return;
      // More columns than a warp takes at once: the weights are found again for each part.
      int begin = 0;
      do {
        attend(p, token, begin);
        begin += ColumnSums<Element>::kColumns;
      } while (begin < p.arguments.problem.head_dim_value);
    });
  }

 private:
  CUTE_DEVICE static void attend(Params const& p, Token const& token, int begin) {
    ForwardArguments const& a = p.arguments;
    Problem const& problem = a.problem;
    Own const& own = token.own;
    int const head_kv = own.head / problem.group_size();
    int const(&position)[kMaxRank] = own.origin;
    auto const of_query = [&](TensorRef const& tensor, auto element) {
      using T = decltype(element);
      return row_of<T>(view_of<Side::kQuery, T>(tensor, problem, own, own.head), position);
    };
    Element const* const query = of_query(a.query, Element{});
    TokenView const keys = view_of<Side::kKey, Element>(a.key, problem, own, head_kv);
    TokenView const values = view_of<Side::kKey, Element>(a.value, problem, own, head_kv);

    OnlineSoftmax<Element> softmax(begin, problem.head_dim_value);
    for_each_of(token.others, [&](int const(&key)[kMaxRank]) {
      Real const logit = p.logits(query, row_of<Element const>(keys, key), own.head, position, key);
      softmax.add(logit, row_of<Element const>(values, key));
    });
    TokenView const additional_keys = plain_view_of<Element>(a.additional_keys, own, head_kv);
    TokenView const additional_values = plain_view_of<Element>(a.additional_values, own, head_kv);
    for (int j = 0; j < problem.additional_keys; ++j) {
      softmax.add(p.logits(query, additional_keys.token<Element const>(0, 0, j)),
                  additional_values.token<Element const>(0, 0, j));
    }
    softmax.add_zeros(token.missing);
    softmax.store_to(of_query(a.output, Element{}));
    if (begin == 0 && Warps::lane() == 0) *of_query(a.lse, Real{}) = softmax.lse();
  }
};

template <class Element, class Launch>
void run_naive_forward(ForwardArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  typename NaiveForward<Element>::Params const params{
      arguments, Partition::make(arguments.problem, Side::kQuery, TileShapes{}), Logits<Element>::make(arguments)};
  launch(NaiveForward<Element>{}, params, Warps::blocks(params.queries.items, context), 0);
}

}  // namespace natten::cuda
