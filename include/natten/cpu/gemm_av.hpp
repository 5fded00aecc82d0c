// SPDX-License-Identifier: MIT
// Unfused weighted sums of values: query tiles in lanes, as in the fused forward pass, with the weights of a chunk read from
// memory and transposed in the L1 cache; 0 in lanes that do not attend.
#pragma once

#include "natten/cpu/weights.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Math>
class Av {
 public:
  using Storage = typename Math::Storage;
  static constexpr bool kSlides = false;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/false, /*key_sum=*/true, /*value_dot=*/false, /*value_sum=*/false};

  ForwardArguments const arguments;

  explicit Av(UnfusedArguments const& a)
      : arguments(streaming_keys(a)), weights_tensor_(a.weights), row_(round_up(arguments.problem.head_dim, kLanes)) {}

  // [lane][row_]
  std::int64_t state_floats() const { return kLanes * row_; }

  void take_scratch(Arena& arena) {
    weights_ = arena.take<Vec>(round_up(kMaxChunkTokens, kLanes));
    by_lane_ = arena.take<float>(kLanes * kLanePitch);
  }

  void clear(float* state) const { std::memset(state, 0, sizeof(float) * state_floats()); }

  void load(TileContext const& c) {
    rows_.point_to(arguments.problem, weights_tensor_, c);
    c.fetch.start(Fetched(output_of(c), c.own, arguments.problem.head_dim));
  }

  void attend(TileContext const& c, KeyStream<Math> const& stream, Tile const& tile, Bias const&, float* state) const {
    int const max_tokens = chunk_tokens(2 * sizeof(Vec) + 4 * stream.key.sum.words / Math::kPerWord);
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      int const tokens = chunk.tokens();
      for_each_run(arguments.problem, tile, chunk, [&](int lane, int r, Interval x, std::int64_t slot) {
        Interval const part = {x.begin - chunk.x, x.end - chunk.x};
        rows_.prefetch_next(lane, slot, x.size());
        load_run(by_lane_ + lane * kLanePitch + r * chunk.width, rows_[lane] + slot - part.begin, part, chunk.width);
      });
      lanes_to_tokens(by_lane_, tokens, weights_);
      accumulate_chunk<Math>(tile, chunk, stream.key, stream.nonfinite, weights_, state, row_, c.fetch);
    });
  }

  void finish(TileContext const& c, float* state) const {
    store_lanes(output_of(c), c.tile, arguments.problem.head_dim, state, row_, [](int) { return 1.0f; });
  }

 private:
  GroupView<Storage> output_of(TileContext const& c) const {
    return query_result<Storage>(arguments, arguments.query, c.item.groups, c.item.batch, c.head,
                                 arguments.problem.head_dim);
  }

  TensorRef weights_tensor_;
  int row_;  // floats of a lane's sum
  Vec* weights_ = nullptr;  // [token][lane]
  float* by_lane_ = nullptr;  // [lane][token]
  WeightRows<Storage const> rows_;
};

template <class Storage>
void gemm_av(UnfusedArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  UnfusedArguments arguments = original;
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.weights);
  run_query_blocks<Math>(Av<Math>(arguments), arguments.num_threads);
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
