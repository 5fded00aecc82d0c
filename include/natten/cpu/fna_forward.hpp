// SPDX-License-Identifier: MIT
// Fused neighborhood attention, forward: query tiles in lanes, online softmax in base 2. The softmax is vertical: every
// vector holds one key's logits for all lanes, so that maximum, exponential and sum need no shuffles.
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

  // [max of the logits so far, base 2 | sum of exp2(logit - max) | output, undivided: [lane][row_]]
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
      Vec highest = before;
      Vec* s = scores_;
      for (int r = 0; r < chunk.rows; ++r) {
        UintVec const row_size = tile.row_size(chunk.z[r], chunk.y[r]);
        for (int i = 0; i < chunk.width; ++i, ++s) {
          IntVec const keep = tile.keep(chunk.x + i, row_size);
          Vec logit = *s * scale;
          if (bias) logit += bias.at(chunk.z[r], chunk.y[r], chunk.x + i, keep) * kLog2e;
          logit = keep ? logit : broadcast(-kInfinity);
          *s = logit;
          highest = maximum(logit, highest);
        }
      }
      Vec const base = raise_max(state, before, highest);
      Vec sum = {};
      int const tokens = chunk.tokens();
      for (int i = 0; i < tokens; ++i) {
        scores_[i] = exp2(scores_[i] - base);
        sum += scores_[i];
      }
      store_vec(state + kLanes, load_vec(state + kLanes) + sum);
      accumulate_chunk<Math>(tile, chunk, stream.value, stream.nonfinite, scores_, state + 2 * kLanes, row_);
    });
  }

  void finish(TileContext const& c, float* state) const {
    add_missing_keys(c, state);
    Vec const max = load_vec(state);
    Vec const sum = load_vec(state + kLanes);
    Vec const inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
    Vec const lse = sum == 0.0f ? broadcast(-kInfinity) : (max + log2(sum)) * kLn2;
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
  // Lets the state refer to a higher maximum, and returns what to subtract from logits. Where no key was seen yet the
  // maximum is -inf; 0 is subtracted there, which keeps exp2(-inf) at 0.
  Vec raise_max(float* state, Vec before, Vec highest) const {
    Vec const base = highest == -kInfinity ? Vec{} : highest;
    store_vec(state, highest);
    if (!any((before != highest) & (before != -kInfinity))) return base;  // nothing was summed under a lower maximum
    Vec const factor = exp2(before - base);
    store_vec(state + kLanes, load_vec(state + kLanes) * factor);
    for (int l = 0; l < kLanes; ++l) {
      float* const row = state + (2 * kLanes + l * row_);
      for (int c = 0; c < row_; c += kLanes) store_vec(row + c, load_vec(row + c) * factor[l]);
    }
    return base;
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
    Vec const base = raise_max(state, before, is_missing ? maximum(before, Vec{}) : before);
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
