// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward, gradient of the query and of the bias table: query tiles in lanes, like
// forward, with the weights recomputed from LSE.
#pragma once

#include "natten/cpu/query_blocks.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// What recomputing the weights of a query takes: with s = scale q k + bias,
//   p = exp(s - lse),  ds = p (dp - delta),  delta = rowsum(dO O) - dLSE.
struct QueryStats {
  float lse2;  // LSE, base 2; +inf where there was no key, so that p is 0 and not NaN
  float delta;
};

template <class Storage>
QueryStats query_stats(BackwardArguments const& arguments, Group const (&groups)[kMaxRank], std::int64_t batch,
                       int head, int z, int y, int x) {
  Problem const& problem = arguments.problem;
  int const dim = problem.head_dim_value;
  Storage const* const out = query_view<Storage const>(problem, arguments.output, groups, batch, head).at(z, y, x);
  Storage const* const d_out = query_view<Storage const>(problem, arguments.d_output, groups, batch, head).at(z, y, x);
  Vec products = {};
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) products += load_vec(out + c) * load_vec(d_out + c);
  if (c < dim) products += load_first(out + c, dim - c) * load_first(d_out + c, dim - c);
  float const lse = *query_view<float const>(problem, arguments.lse, groups, batch, head).at(z, y, x);
  QueryStats stats{lse == -kInfinity ? kInfinity : lse * kLog2e, sum(products)};
  if (arguments.d_lse)
    stats.delta -= *query_view<float const>(problem, arguments.d_lse, groups, batch, head).at(z, y, x);
  return stats;
}

template <class Math>
class GradQuery {
 public:
  using Storage = typename Math::Storage;
  static constexpr bool kSlides = false;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/true, /*key_sum=*/true, /*value_dot=*/true, /*value_sum=*/false};

  BackwardArguments const& arguments;

  explicit GradQuery(BackwardArguments const& arguments_)
      : arguments(arguments_), problem_(arguments.problem), row_(round_up(problem_.head_dim, kLanes)) {}

  // dQ / scale: [lane][row_]
  std::int64_t state_floats() const { return kLanes * row_; }

  // Where this pass adds the gradient of the bias: [heads][table]; null for none.
  void set_bias_gradient(float* d_bias) { d_bias_ = d_bias; }

  void take_scratch(Arena& arena) {
    query_lanes_ = arena.take<Vec>(round_up(problem_.head_dim, kLanes));
    d_output_lanes_ = arena.take<Vec>(round_up(problem_.head_dim_value, kLanes));
    weights_ = arena.take<Vec>(kMaxChunkTokens);
    d_weights_ = arena.take<Vec>(kMaxChunkTokens);
  }

  void clear(float* state) const { std::memset(state, 0, sizeof(float) * state_floats()); }

  void load(TileContext const& c) {
    Group const(&groups)[kMaxRank] = c.item.groups;
    load_lanes<Math>(query_view<Storage const>(problem_, arguments.query, groups, c.item.batch, c.head), c.tile,
                     problem_.head_dim, c.ahead, query_lanes_);
    load_lanes<Math>(query_view<Storage const>(problem_, arguments.d_output, groups, c.item.batch, c.head), c.tile,
                     problem_.head_dim_value, c.ahead, d_output_lanes_);
    prefetch_lanes(query_view<Storage>(problem_, arguments.d_query, groups, c.item.batch, c.head), c.tile,
                   problem_.head_dim, 0);
    if (c.ahead > 0) {
      prefetch_lanes(query_view<Storage const>(problem_, arguments.output, groups, c.item.batch, c.head), c.tile,
                     problem_.head_dim_value, c.ahead);
    }
    lse2_ = broadcast(kInfinity);
    delta_ = Vec{};
    for (int l = 0; l < kLanes; ++l) {
      if (!c.tile.has(l)) continue;
      QueryStats const stats = query_stats<Storage>(arguments, groups, c.item.batch, c.head, c.tile.position[0][l],
                                                    c.tile.position[1][l], c.tile.position[2][l]);
      lse2_[l] = stats.lse2;
      delta_[l] = stats.delta;
    }
  }

  void attend(TileContext const& c, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias,
              float* state) const {
    float const scale = static_cast<float>(problem_.scale) * kLog2e;
    float* const d_bias = d_bias_ != nullptr ? d_bias_ + c.head * Bias::table_size(problem_) : nullptr;
    int const max_tokens = chunk_tokens(2 * sizeof(Vec) + 4 * stream.key.sum.words);
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(query_lanes_, stream.key.dot, chunk.token, chunk.rows, chunk.width, weights_);
      dot_rows<Math>(d_output_lanes_, stream.value.dot, chunk.token, chunk.rows, chunk.width, d_weights_);
      int t = 0;
      for (int r = 0; r < chunk.rows; ++r) {
        UintVec const row_size = tile.row_size(chunk.z[r], chunk.y[r]);
        for (int i = 0; i < chunk.width; ++i, ++t) {
          IntVec const x = chunk.first() + (chunk.x + i);
          IntVec const keep = tile.place(x) < row_size;
          Vec logit = weights_[t] * scale;
          if (bias) logit += bias.at(chunk.z[r], chunk.y[r], x, keep) * kLog2e;
          Vec const d_logit = exp2(logit - lse2_) * (d_weights_[t] - delta_);
          weights_[t] = keep ? d_logit : Vec{};
          if (bias && d_bias != nullptr) bias.scatter(chunk.z[r], chunk.y[r], x, keep, weights_[t], d_bias);
        }
      }
      accumulate_chunk<Math>(tile, chunk, stream.key, stream.nonfinite, weights_, state, row_);
    });
  }

  void finish(TileContext const& c, float* state) const {
    auto const d_query = query_view<Storage>(problem_, arguments.d_query, c.item.groups, c.item.batch, c.head);
    store_lanes(d_query, c.tile, problem_.head_dim, state, row_,
                [&](int) { return static_cast<float>(problem_.scale); });
  }

 private:
  Problem const& problem_;
  int row_;
  float* d_bias_ = nullptr;
  Vec* query_lanes_ = nullptr;     // [word][lane]
  Vec* d_output_lanes_ = nullptr;  // [word][lane]
  Vec* weights_ = nullptr;         // [token][lane]
  Vec* d_weights_ = nullptr;
  Vec lse2_ = {};
  Vec delta_ = {};
};

template <class Math>
void grad_query(BackwardArguments const& arguments) {
  Problem const& problem = arguments.problem;
  GradQuery<Math> const prototype(arguments);
  QueryBlocks<Math> const blocks(problem, prototype.state_floats(), GradQuery<Math>::kSlides, arguments.num_threads);
  std::int64_t const items_per_head = blocks.items_per_head();  // and batch entry
  for_each_unit(arguments, problem.batch * items_per_head, [&](std::int64_t unit, int head_kv, float* d_bias) {
    GradQuery<Math> pass = prototype;  // scratch memory is a thread's own
    pass.set_bias_gradient(d_bias);
    blocks.run_item(pass,
                    (unit / items_per_head * problem.heads_kv + head_kv) * items_per_head + unit % items_per_head);
  });
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
