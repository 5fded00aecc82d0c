// SPDX-License-Identifier: MIT
// Fused neighborhood attention, forward: query tiles in lanes, online softmax in base 2, relative to a guess of the maximum. The
// softmax is vertical: every vector holds one key's logits for all lanes, so that maximum, exponential and sum need no shuffles.
#pragma once

#include "natten/cpu/query_blocks.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Math>
class Forward {
 public:
  using Storage = typename Math::Storage;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/true, /*key_sum=*/false, /*value_dot=*/false, /*value_sum=*/true};

  ForwardArguments const& arguments;

  explicit Forward(ForwardArguments const& arguments_)
      : arguments(arguments_), problem_(arguments.problem), row_(round_up(problem_.head_dim_value, kLanes)) {}

  // [base | sum of exp2(logit - base) | output, undivided: [lane][row_]]
  std::int64_t state_floats() const { return kLanes * (2 + row_); }

  void take_scratch(Arena& arena) {
    lanes_ = arena.take<Vec>(round_up(problem_.head_dim, kLanes));
    scores_ = arena.take<Vec>(kMaxChunkTokens);
  }

  void clear(float* state) const {
    store_vec(state, broadcast(-kInfinity));
    std::memset(state + kLanes, 0, sizeof(float) * kLanes * (1 + row_));
  }

  void load(TileContext const& c) const {
    auto const query = query_view<Storage const>(problem_, arguments.query, c.item.groups, c.item.batch, c.head);
    load_lanes<Math>(query, c.tile, problem_.head_dim, c.ahead, lanes_);
    auto const output = query_view<Storage>(problem_, arguments.output, c.item.groups, c.item.batch, c.head);
    prefetch_lanes(output, c.tile, problem_.head_dim_value, 0);
  }

  void attend(TileContext const&, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias,
              float* state) const {
    float const scale = static_cast<float>(problem_.scale) * kLog2e;
    int const max_tokens = chunk_tokens(sizeof(Vec) + 4 * stream.value.sum.words);
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(lanes_, stream.key.dot, chunk.token, chunk.rows, chunk.width, scores_);
      Vec const before = load_vec(state);
      IntVec const is_first = before == -kInfinity;
      Vec base = any(is_first) ? (is_first ? guess_base(chunk, scale) : before) : before;
      Weights weights = weigh(chunk, tile, bias, scale, base);
      IntVec const is_far =
          (weights.highest > kFar) | (is_first & (weights.highest < -kFar) & (weights.highest != -kInfinity));
      if (any(is_far)) {
        base = is_far ? base + weights.highest : base;
        dot_rows<Math>(lanes_, stream.key.dot, chunk.token, chunk.rows, chunk.width, scores_);
        weights = weigh(chunk, tile, bias, scale, base);
      }
      move_base(state, before, is_first & (weights.highest == -kInfinity) ? before : base);
      store_vec(state + kLanes, load_vec(state + kLanes) + weights.sum);
      accumulate_chunk<Math>(tile, chunk, stream.value, stream.nonfinite, scores_, state + 2 * kLanes, row_);
    });
  }

  void finish(TileContext const& c, float* state) const {
    add_missing_keys(c, state);
    Vec const base = load_vec(state);
    Vec const sum = load_vec(state + kLanes);
    Vec const inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
    Vec const lse = sum == 0.0f ? broadcast(-kInfinity) : (base + log2(sum)) * kLn2;
    auto const output = query_view<Storage>(problem_, arguments.output, c.item.groups, c.item.batch, c.head);
    auto const lse_view = query_view<float>(problem_, arguments.lse, c.item.groups, c.item.batch, c.head);
    for (int l = 0; l < kLanes; ++l) {
      if (!c.tile.has(l)) continue;
      int const z = c.tile.position[0][l], y = c.tile.position[1][l], x = c.tile.position[2][l];
      store_row(output.at(z, y, x), state + (2 * kLanes + l * row_), inverse[l], problem_.head_dim_value);
      *lse_view.at(z, y, x) = lse[l];
    }
  }

 private:
  // What the weights of a chunk are relative to need not be the maximum of the logits: anything near it keeps the sums away
  // from overflow, and the largest weight from underflow. So there is one pass over the scores, with a guess instead of the
  // maximum, and a second one for the rare chunk whose largest weight would be beyond 2^16, or the first below 2^-16.
  static constexpr float kFar = 16;

  // The maximum of the first logits, whether they are attended to or not.
  Vec guess_base(Chunk const& chunk, float scale) const {
    constexpr int kEnough = 8;
    Vec highest = broadcast(-kInfinity);
    for (int i = 0; i < min(chunk.width, kEnough); ++i) highest = maximum(scores_[i] * scale, highest);
    constexpr float kHuge = 1e30f;  // tokens that nobody attends to may hold infinities
    return (highest < kHuge) & (highest > -kHuge) ? highest : Vec{};
  }

  struct Weights {
    Vec highest;  // logit, minus the base
    Vec sum;
  };

  // Makes weights of a chunk's scores: exp2(logit - base).
  NATTEN_INLINE Weights weigh(Chunk const& chunk, Tile const& tile, Bias const& bias, float scale, Vec base) const {
    Weights weights{broadcast(-kInfinity), Vec{}};
    Vec* s = scores_;
    for (int r = 0; r < chunk.rows; ++r) {
      UintVec const row_size = tile.row_size(chunk.z[r], chunk.y[r]);
      for (int i = 0; i < chunk.width; ++i, ++s) {
        IntVec const keep = tile.keep(chunk.x + i, row_size);
        Vec logit = *s * scale - base;
        if (bias) logit += bias.at(chunk.z[r], chunk.y[r], chunk.x + i, keep) * kLog2e;
        logit = keep ? logit : broadcast(-kInfinity);
        weights.highest = maximum(logit, weights.highest);
        *s = exp2(logit);
        weights.sum += *s;
      }
    }
    return weights;
  }

  // Lets the state refer to another base; -inf where it has seen no key yet.
  void move_base(float* state, Vec before, Vec after) const {
    store_vec(state, after);
    if (!any((before != after) & (before != -kInfinity))) return;  // nothing was summed
    Vec const factor = before == after ? broadcast(1.0f) : exp2(before - after);
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
      float all = 1, present = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        Group const& group = c.item.groups[a];
        Interval const window = group.grid_window(c.tile.position[a][l]);
        all *= group.boundary == Boundary::kZeros ? group.unclipped(c.tile.position[a][l]).size() : window.size();
        present *= window.size();
      }
      missing[l] = all - present;
    }
    Vec const before = load_vec(state);
    IntVec const is_missing = missing > 0.0f;
    Vec const base = is_missing ? maximum(before, Vec{}) : before;
    move_base(state, before, base);
    // Elsewhere exp2(-base) may be infinite, and 0 times that NaN.
    store_vec(state + kLanes, load_vec(state + kLanes) + (is_missing ? missing * exp2(-base) : Vec{}));
  }

  Problem const& problem_;
  int row_;  // floats of a lane's output
  Vec* lanes_ = nullptr;  // [word][lane] of the tile's queries
  Vec* scores_ = nullptr;  // [token][lane]
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
