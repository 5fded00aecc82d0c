// SPDX-License-Identifier: MIT
// Unfused query-key products: query tiles in lanes, as in the fused forward pass; scores are transposed in the L1 cache, so
// that what a query has in a row of its window is stored at once. Pairs that do not attend are computed, and dropped.
#pragma once

#include "natten/cpu/weights.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Math>
class Qk {
 public:
  using Storage = typename Math::Storage;
  static constexpr bool kSlides = false;
  static constexpr StreamNeeds kNeeds{/*key_dot=*/true, /*key_sum=*/false, /*value_dot=*/false, /*value_sum=*/false};

  ForwardArguments const arguments;

  explicit Qk(UnfusedArguments const& a)
      : arguments(streaming_keys(a)), weights_(a.weights), unused_(from_float<Storage>(a.unused)) {}

  std::int64_t state_floats() const { return 0; }

  void take_scratch(Arena& arena) {
    lanes_ = arena.take<Vec>(round_up(arguments.problem.head_dim, kLanes));
    scores_ = arena.take<Vec>(round_up(kMaxChunkTokens, kLanes));
    by_lane_ = arena.take<float>(kLanes * kLanePitch);
  }

  void clear(float*) const {}

  void load(TileContext const& c) {
    auto const query =
        query_view<Storage const>(arguments.problem, arguments.query, c.item.groups, c.item.batch, c.head);
    load_lanes<Math>(query, c.tile, arguments.problem.head_dim, lanes_);
    c.fetch.start(Fetched(query, c.next, arguments.problem.head_dim));
    rows_.point_to(arguments.problem, weights_, c);
  }

  void attend(TileContext const&, KeyStream<Math> const& stream, Tile const& tile, Bias const& bias, float*) const {
    int const max_tokens = chunk_tokens(2 * sizeof(Vec) + 4 * stream.key.dot.words);
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(lanes_, stream.key.dot, chunk.token, chunk.rows, chunk.width, scores_);
      tokens_to_lanes(scores_, chunk.tokens(), by_lane_);
      for_each_run(arguments.problem, tile, chunk, [&](int lane, int r, Interval x, std::int64_t slot) {
        if (x.empty()) return;
        float const* const from = by_lane_ + lane * kLanePitch + r * chunk.width + (x.begin - chunk.x);
        float const* const biases = bias ? bias.run(lane, chunk.z[r], chunk.y[r], x.begin) : nullptr;
        rows_.prefetch_next(lane, slot, x.size());
        store_run(rows_[lane] + slot, from, biases, x.size());
      });
    });
  }

  // Slots without a key.
  void finish(TileContext const& c, float*) {
    rows_.point_to(arguments.problem, weights_, c);
    for (int l = 0; l < kLanes; ++l) {
      if (!c.tile.has(l)) continue;
      int attended[kMaxRank], counted[kMaxRank], size[kMaxRank];
      bool is_full = true;
      for (int a = 0; a < kMaxRank; ++a) {
        attended[a] = c.tile.lane_interval(a, l).size();
        counted[a] = c.item.groups[a].counted(c.tile.position[a][l]);
        size[a] = arguments.problem.axes[a].kernel_size;
        is_full = is_full && attended[a] == size[a];
      }
      if (is_full) continue;
      Storage* row = rows_[l];
      for (int z = 0; z < size[0]; ++z) {
        for (int y = 0; y < size[1]; ++y, row += size[2]) {
          int x = z < attended[0] && y < attended[1] ? attended[2] : 0;
          int const counted_x = z < counted[0] && y < counted[1] ? counted[2] : 0;
          for (; x < counted_x; ++x) row[x] = Storage{};
          for (; x < size[2]; ++x) row[x] = unused_;
        }
      }
    }
  }

 private:
  TensorRef weights_;
  Storage unused_;
  Vec* lanes_ = nullptr;  // [word][lane] of the tile's queries
  Vec* scores_ = nullptr;  // [token][lane]
  float* by_lane_ = nullptr;  // [lane][token]
  WeightRows<Storage> rows_;
};

template <class Storage>
void gemm_qk(UnfusedArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  UnfusedArguments arguments = original;
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.weights);
  run_query_blocks<Math>(Qk<Math>(arguments), arguments.num_threads);
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
