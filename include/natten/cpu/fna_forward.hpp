// SPDX-License-Identifier: MIT
// Fused neighborhood attention, forward: query tiles in lanes, online softmax in base 2, relative to a guess of the maximum. The
// softmax is vertical: every vector holds one key's logits for all lanes, so that maximum, exponential and sum need no shuffles.
#pragma once

#include "natten/cpu/query_blocks.hpp"
#include "natten/cpu/softmax.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Math>
class Forward {
 public:
  using Storage = typename Math::Storage;
  static constexpr bool kSlides = true;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/true, /*key_sum=*/false, /*value_dot=*/false, /*value_sum=*/true};

  ForwardArguments const& arguments;

  // `origin`: where to store a level near the highest of every row, which its LSE is then relative to; null for an LSE as it is.
  explicit Forward(ForwardArguments const& arguments_, TensorRef const& origin = {})
      : arguments(arguments_),
        problem_(arguments.problem),
        origin_(origin),
        levels_(problem_),
        row_(round_up(problem_.head_dim_value, kLanes)) {}

  // [base, a level | sum of weights, relative to the base | output, undivided: [lane][row_]]
  std::int64_t state_floats() const { return kLanes * (2 + row_); }

  void take_scratch(Arena& arena) {
    lanes_ = arena.take<Vec>(kPanelTiles * lanes_step());
    scores_ = arena.take<Vec>(kPanelTiles * kScoreVectors);
  }

  void clear(float* state) const {
    store_vec(state, broadcast(-kInfinity));
    std::memset(state + kLanes, 0, sizeof(float) * kLanes * (1 + row_));
  }

  void load(TileContext const& c) const {
    auto const query = query_view<Storage const>(problem_, arguments.query, c.item.groups, c.item.batch, c.head);
    load_lanes<Math>(query, c.tile, problem_.head_dim, lanes_ + c.index * lanes_step());
    if (c.index > 0) return;
    c.fetch.start(Fetched(query, c.next, problem_.head_dim), Fetched(output_of(c), c.own, problem_.head_dim_value));
  }

  void attend(TileContext const& c, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias,
              float* state) const {
    Vec const* const lanes = lanes_ + c.index * lanes_step();
    for_each_chunk(tile, stream.box, max_tokens(stream), Math::kPerWord, [&](Chunk const& chunk) {
      auto const score = [&] { dot_rows<Math>(lanes, stream.key.dot, chunk.token, chunk.rows, chunk.width, scores_); };
      score();
      add_chunk(chunk, stream, tile, bias, scores_, score, state, c.fetch);
    });
  }

  void attend_panel(TileContext const& c, KeyStream<Math> const& stream, Bias const* biases, float* states) const {
    Panel const& panel = c.panel;
    for_each_panel_chunk(
        panel, c.is_line, stream.box, max_tokens(stream, kPanelChunkBytes), Math::kPerWord,
        [&](PanelChunk const& chunk) {
          auto const score = [&](Interval tiles) {
            slide_rows<Math>(chunk, tiles, stream.box, stream.key.slide, lanes_, lanes_step(), scores_, c.fetch);
          };
          score({0, panel.count()});
          for (int t = 0; t < panel.count(); ++t) {
            if (chunk.of_tile[t].rows == 0) continue;
            add_chunk(
                chunk.of_tile[t], stream, panel[t], biases[t], scores_ + t * kScoreVectors + kMaxPadding,
                [&] { score({t, t + 1}); }, states + t * state_floats(), c.fetch);
          }
        });
  }

  void finish(TileContext const& c, float* state) const {
    add_missing_keys(c, state);
    Vec const base = load_vec(state);
    Vec const sum = load_vec(state + kLanes);
    Vec const inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
    Vec const origin = origin_ ? Vec{} : base * levels_.logit();
    Vec const lse = sum == 0.0f ? broadcast(-kInfinity) : origin + log2(sum) * kLn2;
    store_lanes(output_of(c), c.tile, problem_.head_dim_value, state + 2 * kLanes, row_,
                [&](int l) { return inverse[l]; });
    store_statistic(c, arguments.lse, lse);
    if (origin_) store_statistic(c, origin_, sum == 0.0f ? Vec{} : base);
  }

 private:
  GroupView<Storage> output_of(TileContext const& c) const {
    return query_result<Storage>(arguments, arguments.output, c.item.groups, c.item.batch, c.head,
                                 problem_.head_dim_value);
  }
  // One number a row.
  void store_statistic(TileContext const& c, TensorRef const& to, Vec v) const {
    auto const view = query_view<float>(problem_, to, c.item.groups, c.item.batch, c.head);
    for (int l = 0; l < kLanes; ++l) {
      if (c.tile.has(l)) *view.at(c.tile.position[0][l], c.tile.position[1][l], c.tile.position[2][l]) = v[l];
    }
  }
  std::int64_t lanes_step() const { return round_up(problem_.head_dim, kLanes); }
  static int max_tokens(KeyStream<Math> const& stream, int chunk_bytes = kChunkBytes) {
    return chunk_tokens(sizeof(Vec) + 4 * stream.value.sum.words, chunk_bytes);
  }

  // Adds a chunk, of which the scores are made, to the state of a tile; `score` makes them again.
  template <class Score>
  void add_chunk(Chunk const& chunk, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias, Vec* scores,
                 Score const& score, float* state, FetchAhead& fetch) const {
    Vec const before = load_vec(state);
    IntVec const is_first = before == -kInfinity;
    Vec base = any(is_first) ? (is_first ? guess_base(chunk, scores) : before) : before;
    bool const is_whole = tile.takes_all(chunk);
    auto const weigh_all = [&] {
      return is_whole ? weigh<true>(chunk, tile, bias, base, scores) : weigh<false>(chunk, tile, bias, base, scores);
    };
    Weights weights = weigh_all();
    Vec const above = (weights.highest - base) * levels_.log2();
    IntVec const is_far = (above > kFar) | (is_first & (above < -kFar) & (weights.highest != -kInfinity));
    if (any(is_far)) {
      base = is_far ? weights.highest : base;
      score();
      weights = weigh_all();
    }
    move_base(state, before, is_first & (weights.highest == -kInfinity) ? before : base);
    store_vec(state + kLanes, load_vec(state + kLanes) + weights.sum);
    if (row_ == 0) return;
    accumulate_chunk<Math>(tile, chunk, stream.value, stream.nonfinite, scores, state + 2 * kLanes, row_, fetch);
  }

  // What the weights of a chunk are relative to need not be the highest level: anything near it keeps the sums away from
  // overflow, and the largest weight from underflow. So there is one pass over the scores, with a guess instead of the
  // maximum, and a second one, with the maximum, for the rare chunk whose largest weight would be beyond 2^16, or the first below
  // 2^-16.
  static constexpr float kFar = 16;

  // The maximum of the first levels without their bias, whether they are attended to or not.
  Vec guess_base(Chunk const& chunk, Vec const* scores) const {
    constexpr int kEnough = 8;
    Vec highest = broadcast(-kInfinity);
    for (int i = 0; i < min(chunk.slots, kEnough); ++i) highest = maximum(levels_.of(scores[i]), highest);
    constexpr float kHuge = 1e30f;  // tokens that nobody attends to may hold infinities
    return (highest < kHuge) & (highest > -kHuge) ? highest : Vec{};
  }

  struct Weights {
    Vec highest;  // level
    Vec sum;
  };

  // Makes weights of a chunk's scores, relative to a base. `kIsWhole`: all lanes take part in all slots.
  template <bool kIsWhole>
  Weights weigh(Chunk const& chunk, Tile const& tile, Bias const& bias, Vec base, Vec* scores) const {
    Weights weights{broadcast(-kInfinity), Vec{}};
    Levels const levels = levels_;
    UintVec const place = tile.place(chunk.first() + chunk.x);
    for (int r = 0; r < chunk.rows; ++r) {
      UintVec const row_size = kIsWhole ? tile.size[2] : tile.row_size(chunk.z[r], chunk.y[r]);
      Vec* s = scores + r * chunk.pitch;
      for (int i = 0; i < chunk.slots; ++i, ++s) {
        IntVec const keep = kIsWhole ? broadcast(-1) : place + i < row_size;
        Vec level = levels.of(*s, bias, chunk.z[r], chunk.y[r], chunk.first() + (chunk.x + i), keep);
        if constexpr (!kIsWhole) level = keep ? level : broadcast(-kInfinity);
        weights.highest = maximum(level, weights.highest);
        *s = exp2((level - base) * levels.log2());
        weights.sum += *s;
      }
    }
    return weights;
  }

  // Lets the state refer to another base; -inf where it has seen no key yet.
  void move_base(float* state, Vec before, Vec after) const {
    store_vec(state, after);
    if (!any((before != after) & (before != -kInfinity))) return;  // nothing was summed
    Vec const factor = before == after ? broadcast(1.0f) : exp2((before - after) * levels_.log2());
    store_vec(state + kLanes, load_vec(state + kLanes) * factor);
    for (int l = 0; l < kLanes; ++l) {
      float* const row = state + (2 * kLanes + l * row_);
      for (int c = 0; c < row_; c += kLanes) store_vec(row + c, load_vec(row + c) * factor[l]);
    }
  }

  // Boundary "zeros": n missing keys, with logit 0 and value 0, join the denominator.
  void add_missing_keys(TileContext const& c, float* state) const {
    Vec missing = {};
    bool found = false;
    for (Group const& group : c.item.groups) found |= group.boundary == Boundary::kZeros;
    if (!found) return;
    for (int l = 0; l < kLanes; ++l) {
      if (!c.tile.has(l)) continue;
      int counted[kMaxRank], present[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) {
        counted[a] = c.item.groups[a].counted(c.tile.position[a][l]);
        present[a] = c.item.groups[a].window(c.tile.position[a][l]).size();
      }
      missing[l] = static_cast<float>(missing_keys(counted, present));
    }
    Vec const before = load_vec(state);
    IntVec const is_missing = missing > 0.0f;
    Vec const base = is_missing ? maximum(before, Vec{}) : before;
    move_base(state, before, base);
    // Elsewhere the weight of 0 may be infinite, and 0 times that NaN.
    Vec const weight = exp2((0.0f - base) * levels_.log2());
    store_vec(state + kLanes, load_vec(state + kLanes) + (is_missing ? missing * weight : Vec{}));
  }

  Problem const& problem_;
  TensorRef origin_;
  Levels levels_;
  int row_;  // floats of a lane's output
  Vec* lanes_ = nullptr;  // [tile][word][lane] of the panel's queries
  Vec* scores_ = nullptr;  // [tile][row][slot][lane]
};

template <class Storage>
void fna_forward(ForwardArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  ForwardArguments arguments = original;
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.value, arguments.output,
                      arguments.lse);
  run_query_blocks<Math>(Forward<Math>(arguments), arguments.num_threads);
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
