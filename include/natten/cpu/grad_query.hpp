// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward, gradients of the query and of the bias table: query tiles in lanes, like forward, with
// the weights recomputed from LSE. Where an item has all queries that attend to some keys, it sums the gradients of these, too.
#pragma once

#include "natten/cpu/query_blocks.hpp"
#include "natten/cpu/softmax.hpp"
#include "natten/cpu/token_sums.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

struct GradArguments : BackwardArguments {
  TensorRef origin;  // of every row, a level that its LSE is relative to, of the shape of LSE; null if LSE is as it is
};

// What recomputing the weights of a query takes: with levels as in softmax.hpp,
//   p = 2^(log2 (level - origin) - lse2),  ds = p (dp - delta),  delta = rowsum(dO O) - dLSE.
struct QueryStats {
  float origin;
  float lse2;  // LSE relative to the origin, base 2; +inf where there was no key, so that p is 0 and not NaN
  float delta;
};

template <class Storage>
QueryStats query_stats(GradArguments const& arguments, Levels const& levels, Group const (&groups)[kMaxRank],
                       std::int64_t batch, int head, int z, int y, int x) {
  Problem const& problem = arguments.problem;
  int const dim = problem.head_dim_value;
  Storage const* const out = query_view<Storage const>(problem, arguments.output, groups, batch, head).at(z, y, x);
  Storage const* const d_out = query_view<Storage const>(problem, arguments.d_output, groups, batch, head).at(z, y, x);
  Vec products = {};
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) products += load_vec(out + c) * load_vec(d_out + c);
  if (c < dim) products += load_first(out + c, dim - c) * load_first(d_out + c, dim - c);
  auto const statistic = [&](TensorRef const& tensor) {
    return *query_view<float const>(problem, tensor, groups, batch, head).at(z, y, x);
  };
  float const lse = statistic(arguments.lse);
  QueryStats stats{0, __builtin_fabsf(lse) * kLog2e, sum(products)};
  if (stats.lse2 < kInfinity) {
    // Near LSE, a difference of levels is exact.
    stats.origin = arguments.origin ? statistic(arguments.origin) : lse / levels.logit();
    stats.lse2 = (arguments.origin ? lse : lse - stats.origin * levels.logit()) * kLog2e;
  }
  if (arguments.d_lse) stats.delta -= statistic(arguments.d_lse);
  return stats;
}

template <class Math>
class GradQuery {
 public:
  using Storage = typename Math::Storage;
  static constexpr bool kSlides = true;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/true, /*key_sum=*/true, /*value_dot=*/true, /*value_sum=*/false};

  GradArguments const& arguments;

  explicit GradQuery(GradArguments const& arguments_)
      : arguments(arguments_),
        problem_(arguments.problem),
        levels_(problem_),
        row_k_(round_up(problem_.head_dim, kLanes)),
        row_v_(round_up(problem_.head_dim_value, kLanes)) {}

  // dQ / scale: [lane][row_k_]
  std::int64_t state_floats() const { return kLanes * row_k_; }
  // Gradients of a key and its value.
  std::int64_t key_floats() const { return row_k_ + row_v_; }

  // Where this pass adds the gradient of the bias: [heads][table]; null for none.
  void set_bias_gradient(float* d_bias) { d_bias_ = d_bias; }
  // Lets an item sum the gradients of keys and values, too, and store those of its share. `tokens`: of its ring.
  void set_key_tokens(std::int64_t tokens) { key_tokens_ = tokens; }

  void take_scratch(Arena& arena) {
    query_lanes_ = arena.take<Vec>(kPanelTiles * row_k_);
    d_output_lanes_ = arena.take<Vec>(kPanelTiles * row_v_);
    weights_ = arena.take<Vec>(kPanelTiles * kScoreVectors);
    d_weights_ = arena.take<Vec>(kPanelTiles * kScoreVectors);
    if (key_tokens_ == 0) return;
    query_rows_ = arena.take<Word>(kPanelTiles * Sums::row_words(problem_.head_dim));
    d_output_rows_ = arena.take<Word>(kPanelTiles * Sums::row_words(problem_.head_dim_value));
    lane_weights_ = arena.take<Vec>(Sums::kScratch);
    d_key_.data = arena.take<float>(key_tokens_ * row_k_);
    d_value_.data = arena.take<float>(key_tokens_ * row_v_);
  }

  void clear(float* state) const { std::memset(state, 0, sizeof(float) * state_floats()); }

  void load(TileContext const& c) {
    Group const(&groups)[kMaxRank] = c.item.groups;
    auto const view = [&](TensorRef const& tensor) {
      return query_view<Storage const>(problem_, tensor, groups, c.item.batch, c.head);
    };
    auto const query = view(arguments.query), d_output = view(arguments.d_output);
    load_lanes<Math>(query, c.tile, problem_.head_dim, query_lanes_ + c.index * row_k_);
    load_lanes<Math>(d_output, c.tile, problem_.head_dim_value, d_output_lanes_ + c.index * row_v_);
    if (key_tokens_ > 0) {
      if (c.index == 0) nonfinite_rows_ = false;
      nonfinite_rows_ |= load_lane_rows<Math>(query, c.tile, problem_.head_dim,
                                              Sums::rows_of(query_rows_, c.index, problem_.head_dim));
      nonfinite_rows_ |= load_lane_rows<Math>(d_output, c.tile, problem_.head_dim_value,
                                              Sums::rows_of(d_output_rows_, c.index, problem_.head_dim_value));
    }
    if (c.index == 0) {
      c.fetch.start(Fetched(query, c.next, problem_.head_dim), Fetched(d_output, c.next, problem_.head_dim_value),
                    Fetched(view(arguments.output), c.next, problem_.head_dim_value),
                    Fetched(d_query_of(c), c.own, problem_.head_dim));
    }
    Vec& origin = origin_[c.index];
    Vec& lse2 = lse2_[c.index];
    Vec& delta = delta_[c.index];
    origin = delta = Vec{};
    lse2 = broadcast(kInfinity);
    for (int l = 0; l < kLanes; ++l) {
      if (!c.tile.has(l)) continue;
      QueryStats const stats =
          query_stats<Storage>(arguments, levels_, groups, c.item.batch, c.head, c.tile.position[0][l],
                               c.tile.position[1][l], c.tile.position[2][l]);
      origin[l] = stats.origin;
      lse2[l] = stats.lse2;
      delta[l] = stats.delta;
    }
  }

  void attend(TileContext const& c, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias,
              float* state) const {
    for_each_chunk(tile, stream.box, max_tokens(stream), Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(query_lanes_ + c.index * row_k_, stream.key.dot, chunk.token, chunk.rows, chunk.width, weights_);
      dot_rows<Math>(d_output_lanes_ + c.index * row_v_, stream.value.dot, chunk.token, chunk.rows, chunk.width,
                     d_weights_);
      weigh(c, c.index, chunk, tile, bias, weights_, d_weights_);
      accumulate_chunk<Math>(tile, chunk, stream.key, stream.nonfinite, d_weights_, state, row_k_, c.fetch);
    });
  }

  void attend_panel(TileContext const& c, KeyStream<Math> const& stream, Bias const* biases, float* states) {
    Panel const& panel = c.panel;
    if (key_tokens_ > 0) reach_keys(c.item, stream.box);
    for_each_panel_chunk(
        panel, c.is_line, stream.box, max_tokens(stream, kPanelChunkBytes), Math::kPerWord,
        [&](PanelChunk const& chunk) {
          Interval const tiles = {0, panel.count()};
          slide_rows<Math>(chunk, tiles, stream.box, stream.key.slide, query_lanes_, row_k_, weights_, c.fetch);
          slide_rows<Math>(chunk, tiles, stream.box, stream.value.slide, d_output_lanes_, row_v_, d_weights_, c.fetch);
          auto const scores_of = [](Vec* scores, int t) { return scores + t * kScoreVectors + kMaxPadding; };
          for (int t = 0; t < panel.count(); ++t) {
            weigh(c, t, chunk.of_tile[t], panel[t], biases[t], scores_of(weights_, t), scores_of(d_weights_, t));
          }
          if (key_tokens_ > 0) {
            auto const sums = [&](Word* rows, int dim) {
              return Sums(panel, chunk, stream.box, rows, dim, nonfinite_rows_);
            };
            sums(query_rows_, problem_.head_dim).add(d_weights_, lane_weights_, d_key_, c.fetch);
            sums(d_output_rows_, problem_.head_dim_value).add(weights_, lane_weights_, d_value_, c.fetch);
          }
          for (int t = 0; t < panel.count(); ++t) {
            if (chunk.of_tile[t].rows == 0) continue;
            accumulate_chunk<Math>(panel[t], chunk.of_tile[t], stream.key, stream.nonfinite, scores_of(d_weights_, t),
                                   states + t * state_floats(), row_k_, c.fetch);
          }
        });
  }

  void finish(TileContext const& c, float* state) const {
    store_lanes(d_query_of(c), c.tile, c.item.own_lanes(c.tile), problem_.head_dim, state, row_k_,
                [&](int) { return static_cast<float>(problem_.scale); });
  }

  // Stores what sums of keys are left at the end of an item.
  void finish_keys(Schedule::Item const& item) {
    if (key_tokens_ > 0 && !reach_.empty()) store_keys(item, reach_);
  }

 private:
  using Sums = PanelSums<Math>;

  static int max_tokens(KeyStream<Math> const& stream, int chunk_bytes = kChunkBytes) {
    return chunk_tokens(2 * sizeof(Vec) + 4 * stream.key.sum.words, chunk_bytes);
  }

  // Makes, of the products of a chunk, q k and dO v, weights p and the gradients of logits ds.
  void weigh(TileContext const& c, int index, Chunk const& chunk, Tile const& tile, Bias const& bias, Vec* weights,
             Vec* d_weights) const {
    BiasGradient d_bias;
    if (d_bias_ != nullptr) d_bias = {d_bias_ + c.head * Bias::table_size(problem_), c.item.own_lanes(tile)};
    if (tile.takes_all(chunk)) weigh<true>(index, chunk, tile, bias, d_bias, weights, d_weights);
    else weigh<false>(index, chunk, tile, bias, d_bias, weights, d_weights);
  }

  // `kIsWhole`: all lanes take part in all slots.
  template <bool kIsWhole>
  void weigh(int index, Chunk const& chunk, Tile const& tile, Bias const& bias, BiasGradient const& d_bias,
             Vec* weights, Vec* d_weights) const {
    Levels const levels = levels_;
    Vec const origin = origin_[index], lse2 = lse2_[index], delta = delta_[index];
    UintVec const place = tile.place(chunk.first() + chunk.x);
    for (int r = 0; r < chunk.rows; ++r) {
      UintVec const row_size = kIsWhole ? tile.size[2] : tile.row_size(chunk.z[r], chunk.y[r]);
      Vec* s = weights + r * chunk.pitch;
      Vec* d = d_weights + r * chunk.pitch;
      for (int i = 0; i < chunk.slots; ++i, ++s, ++d) {
        IntVec const x = chunk.first() + (chunk.x + i);
        IntVec const keep = kIsWhole ? broadcast(-1) : place + i < row_size;
        Vec const level = levels.of(*s, bias, chunk.z[r], chunk.y[r], x, keep);
        Vec const weight = exp2((level - origin) * levels.log2() - lse2);
        Vec const d_logit = weight * (*d - delta);
        *s = kIsWhole || keep ? weight : Vec{};
        *d = kIsWhole || keep ? d_logit : Vec{};
        if (bias && d_bias.table != nullptr) bias.scatter(chunk.z[r], chunk.y[r], x, keep, *d, d_bias);
      }
    }
  }

  // Lets the sums be of the keys that a box holds.
  void reach_keys(Schedule::Item const& item, StreamBox const& box) {
    if (reach_ == box.axis[0]) return;
    if (reach_.empty()) {  // the first
      for (TokenSums* sums : {&d_key_, &d_value_}) {
        sums->box[0] = {box.origin, box.axis[0].end};
        sums->box[1] = box.axis[1];
        sums->box[2] = box.axis[2];
        sums->ring = box.ring;
      }
      d_key_.row = row_k_;
      d_value_.row = row_v_;
      reach_ = {box.origin, box.origin};
    }
    move_reach(
        reach_, box.axis[0],
        [&](Interval slices) {
          d_key_.clear(slices);
          d_value_.clear(slices);
        },
        [&](Interval slices) { store_keys(item, slices); });
  }

  GroupView<Storage> d_query_of(TileContext const& c) const {
    return query_result<Storage>(arguments, arguments.d_query, c.item.groups, c.item.batch, c.head, problem_.head_dim);
  }

  void store_keys(Schedule::Item const& item, Interval slices) const {
    auto const view = [&](TensorRef const& tensor, int dim) {
      return key_result<Storage>(arguments, tensor, item.groups, item.batch, item.head_kv, dim);
    };
    int const dim = problem_.head_dim, dim_value = problem_.head_dim_value;
    Interval const keys[kMaxRank] = {slices.clipped_to(item.share[0]), item.share[1], item.share[2]};
    d_key_.store(view(arguments.d_key, dim), keys, dim, static_cast<float>(problem_.scale));
    d_value_.store(view(arguments.d_value, dim_value), keys, dim_value, 1.0f);
  }

  Problem const& problem_;
  Levels levels_;
  int row_k_;
  int row_v_;
  float* d_bias_ = nullptr;
  std::int64_t key_tokens_ = 0;
  Vec* query_lanes_ = nullptr;  // [tile][word][lane]
  Vec* d_output_lanes_ = nullptr;  // [tile][word][lane]
  Vec* weights_ = nullptr;  // [tile][row][slot][lane]
  Vec* d_weights_ = nullptr;
  Vec origin_[kPanelTiles] = {};
  Vec lse2_[kPanelTiles] = {};
  Vec delta_[kPanelTiles] = {};
  // For the sums of keys.
  Word* query_rows_ = nullptr;  // [tile][lane][channel]
  Word* d_output_rows_ = nullptr;
  bool nonfinite_rows_ = false;
  Vec* lane_weights_ = nullptr;
  TokenSums d_key_;  // dK / scale
  TokenSums d_value_;
  Interval reach_;  // slices along the first axis
};

template <class Math>
void run_grad_query(GradArguments const& arguments, QueryBlocks<Math> const& blocks, bool with_keys) {
  Problem const& problem = arguments.problem;
  GradQuery<Math> const prototype(arguments);
  std::int64_t const items_per_head = blocks.items_per_head();  // and batch entry
  for_each_unit(arguments, problem.batch * items_per_head, [&](std::int64_t unit, int head_kv, float* d_bias) {
    std::int64_t const index =
        (unit / items_per_head * problem.heads_kv + head_kv) * items_per_head + unit % items_per_head;
    GradQuery<Math> pass = prototype;  // scratch memory is a thread's own
    pass.set_bias_gradient(d_bias);
    if (with_keys) pass.set_key_tokens(blocks.ring_tokens(index));
    blocks.run_item(pass, index);
    if (with_keys) pass.finish_keys(blocks.item(index));
  });
}

template <class Math>
void grad_query(GradArguments const& arguments) {
  using Pass = GradQuery<Math>;
  QueryBlocks<Math> const blocks(arguments.problem, Pass(arguments).state_floats(), Pass::kNeeds, Pass::kSlides,
                                 arguments.num_threads);
  run_grad_query(arguments, blocks, /*with_keys=*/false);
}

// All gradients in one pass, where keys slide past more than a line, there is work for every thread, and room for the sums of
// blocks that are not too narrow. Returns whether that is so.
template <class Math>
bool grad_query_with_keys(GradArguments const& arguments) {
  using Pass = GradQuery<Math>;
  Problem const& problem = arguments.problem;
  if (problem.additional_keys > 0 || has_lines(problem)) return false;
  Pass const pass(arguments);
  QueryBlocks<Math> const blocks(problem, pass.state_floats(), Pass::kNeeds, Pass::kSlides, /*num_threads=*/1,
                                 pass.key_floats());
  if (!blocks.slides() || !blocks.can_complete_sums()) return false;
  if (!keeps_busy(arguments.num_threads, blocks.items())) return false;
  run_grad_query(arguments, blocks, /*with_keys=*/true);
  return true;
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
