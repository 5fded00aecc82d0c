// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward, gradients of key and value: key tiles in lanes, and the queries of their inverse
// windows streamed. Every gradient is summed by one thread in one order: deterministic, no atomics.
#pragma once

#include "natten/cpu/grad_query.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Keys of windows and additional keys are the same work on different tensors: the latter are a line of tokens that every
// query of every dilation group attends to.
enum class KeySource { kWindow, kAdditional };

template <class Math>
class GradKeyValue {
 public:
  using Storage = typename Math::Storage;

  GradKeyValue(BackwardArguments const& arguments, KeySource source)
      : arguments_(arguments),
        problem_(arguments.problem),
        source_(source),
        axes_(source == KeySource::kWindow ? problem_ : line_of(problem_)),
        row_k_(round_up(problem_.head_dim, kLanes)),
        row_v_(round_up(problem_.head_dim_value, kLanes)),
        words_k_(PackedTensor<Math>::words(problem_.head_dim, kSample) / kSample),
        words_v_(PackedTensor<Math>::words(problem_.head_dim_value, kSample) / kSample),
        max_packed_(kPackedBytes / 4 / (words_k_ + words_v_)),
        schedule_(axes_, Side::kKey, max_packed_, kStateBytes / (4 * (row_k_ + row_v_)), arguments.num_threads) {}

  void run() const {
    for_each_item(schedule_.items, arguments_.num_threads, [this](std::int64_t i) { run_item(i); });
  }

 private:
  static constexpr int kSample = 1 << 10;

  // The additional keys as a problem of their own.
  static Problem line_of(Problem const& problem) {
    Problem line = problem;
    Axis token;
    token.extent = token.kernel_size = token.query_extent = token.key_extent = problem.additional_keys;
    line.axes[0] = line.axes[1] = Axis();
    line.axes[2] = token;
    choose_tiles(line);
    return line;
  }

  struct Memory {
    Interval* intervals;
    Word* packed;
    QueryStats* stats;  // [packed token]
    Vec* key_lanes;     // [word][lane]
    Vec* value_lanes;   // [word][lane]
    Vec* weights;       // [token][lane]
    Vec* d_weights;
    float* states;  // [tile][lane][row_k_ of dK / scale, then row_v_ of dV]
  };

  Memory take_memory(Arena& arena, std::int64_t states) const {
    Memory m;
    m.intervals = arena.take<Interval>(schedule_.positions());
    m.packed = arena.take<Word>((words_k_ + words_v_) * max_packed_);
    m.stats = arena.take<QueryStats>(max_packed_);
    m.key_lanes = arena.take<Vec>(row_k_);
    m.value_lanes = arena.take<Vec>(row_v_);
    m.weights = arena.take<Vec>(kMaxChunkTokens);
    m.d_weights = arena.take<Vec>(kMaxChunkTokens);
    m.states = arena.take<float>(states * state_floats());
    return m;
  }

  std::int64_t state_floats() const { return std::int64_t{kLanes} * (row_k_ + row_v_); }

  template <class T>
  GroupView<T> tile_view(TensorRef const& window, TensorRef const& additional, Schedule::Item const& item) const {
    return source_ == KeySource::kWindow ? key_view<T>(problem_, window, item.groups, item.batch, item.head_kv)
                                         : additional_view<T>(additional, item.batch, item.head_kv);
  }

  // Calls use(groups, box) for the boxes of queries that attend to the item's keys, one a dilation group.
  template <class Use>
  void for_each_query_box(Schedule::Item const& item, Use const& use) const {
    Interval box[kMaxRank];
    if (source_ == KeySource::kWindow) {
      for (int a = 0; a < kMaxRank; ++a) box[a] = item.groups[a].queries_of(item.block[a]);
      use(item.groups, box);
      return;
    }
    Axis const(&axes)[kMaxRank] = problem_.axes;
    for (int g = 0; g < axes[0].groups() * axes[1].groups() * axes[2].groups(); ++g) {
      Group const groups[kMaxRank] = {axes[0].group(g / axes[2].groups() / axes[1].groups()),
                                      axes[1].group(g / axes[2].groups() % axes[1].groups()),
                                      axes[2].group(g % axes[2].groups())};
      for (int a = 0; a < kMaxRank; ++a) box[a] = groups[a].queries;
      use(groups, box);
    }
  }

  void run_item(std::int64_t index) const {
    Schedule::Item const item = schedule_.item(axes_, index);
    if (item.empty) return;

    int pieces = 0;
    for_each_query_box(item, [&](Group const(&)[kMaxRank], Interval const(&box)[kMaxRank]) {
      for_each_piece(box, max_packed_, Math::kPerWord, [&](StreamBox const&) { pieces += problem_.group_size(); });
    });
    std::int64_t const states = pieces <= 1 ? 1 : schedule_.tiles_per_block();
    Arena counter(nullptr);
    take_memory(counter, states);
    Arena arena(thread_workspace(counter.used()));
    Memory const memory = take_memory(arena, states);
    AxisIntervals intervals[kMaxRank];
    auto const state_of = [&](int tile_index) { return memory.states + (states == 1 ? 0 : tile_index) * state_floats(); };

    int piece = 0;
    for_each_query_box(item, [&](Group const(&groups)[kMaxRank], Interval const(&box)[kMaxRank]) {
      fill(item, box, memory.intervals, intervals);
      for (int h = 0; h < problem_.group_size(); ++h) {
        int const head = item.head_kv * problem_.group_size() + h;
        for_each_piece(box, max_packed_, Math::kPerWord, [&](StreamBox const& stream) {
          bool const is_first = piece == 0;
          bool const is_last = ++piece == pieces;
          PackedTensor<Math> const query(memory.packed, problem_.head_dim, stream.tokens());
          PackedTensor<Math> const d_output(
              memory.packed + PackedTensor<Math>::words(problem_.head_dim, stream.tokens()), problem_.head_dim_value,
              stream.tokens());
          bool const nonfinite = pack(groups, item.batch, head, stream, query, d_output, memory.stats);
          for_each_tile(item, schedule_.tile, [&](int const(&corner)[kMaxRank], int tile_index) {
            Tile const tile(schedule_.tile, corner, item.block, intervals);
            float* const state = state_of(tile_index);
            if (is_first) std::memset(state, 0, sizeof(float) * state_floats());
            int const ahead = tile.box[2].end < item.block[2].end ? schedule_.tile.size[2] : 0;
            load_lanes<Math>(tile_view<Storage const>(arguments_.key, arguments_.additional_keys, item), tile,
                             problem_.head_dim, ahead, memory.key_lanes);
            load_lanes<Math>(tile_view<Storage const>(arguments_.value, arguments_.additional_values, item), tile,
                             problem_.head_dim_value, ahead, memory.value_lanes);
            prefetch_lanes(tile_view<Storage>(arguments_.d_key, arguments_.d_additional_keys, item), tile,
                           problem_.head_dim, 0);
            prefetch_lanes(tile_view<Storage>(arguments_.d_value, arguments_.d_additional_values, item), tile,
                           problem_.head_dim_value, 0);
            Bias const bias = source_ == KeySource::kWindow
                                  ? Bias(problem_, arguments_.rpb, head, tile, Side::kKey)
                                  : Bias();
            attend(tile, stream, query, d_output, nonfinite, bias, memory, state);
            if (is_last) finish(item, tile, state);
          });
        });
      }
    });
    if (pieces == 0) {  // keys that no query attends to
      for_each_tile(item, schedule_.tile, [&](int const(&corner)[kMaxRank], int) {
        Interval const none[kMaxRank] = {};
        fill(item, none, memory.intervals, intervals);
        Tile const tile(schedule_.tile, corner, item.block, intervals);
        std::memset(memory.states, 0, sizeof(float) * state_floats());
        finish(item, tile, memory.states);
      });
    }
  }

  // The queries of every key of the block: its inverse window, or the whole box.
  void fill(Schedule::Item const& item, Interval const (&box)[kMaxRank], Interval* memory,
            AxisIntervals (&intervals)[kMaxRank]) const {
    if (source_ == KeySource::kWindow) {
      fill_intervals(item, Side::kKey, memory, intervals);
      return;
    }
    for (int a = 0; a < kMaxRank; ++a) {
      intervals[a] = {memory, item.block[a].begin};
      for (int i = 0; i < item.block[a].size(); ++i) *memory++ = box[a];
    }
  }

  bool pack(Group const (&groups)[kMaxRank], std::int64_t batch, int head, StreamBox const& box,
            PackedTensor<Math> const& query, PackedTensor<Math> const& d_output, QueryStats* stats) const {
    bool const q = query.pack(query_view<Storage const>(problem_, arguments_.query, groups, batch, head), box,
                              /*as_dot=*/true, /*as_sum=*/true);
    bool const d = d_output.pack(query_view<Storage const>(problem_, arguments_.d_output, groups, batch, head), box,
                                 /*as_dot=*/true, /*as_sum=*/true);
    auto const output = query_view<Storage const>(problem_, arguments_.output, groups, batch, head);
    for (int z = box.axis[0].begin; z < box.axis[0].end; ++z) {
      for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
        QueryStats* row = stats + box.token(z, y, box.axis[2].begin);
        for (int x = box.axis[2].begin; x < box.axis[2].begin + box.pitch; ++x) {
          if (x + kPrefetchTokens < box.axis[2].end) prefetch_token(output.at(z, y, x + kPrefetchTokens), problem_.head_dim_value);
          *row++ = x < box.axis[2].end ? query_stats<Storage>(arguments_, groups, batch, head, z, y, x)
                                       : QueryStats{kInfinity, 0};
        }
      }
    }
    return q || d;
  }

  void attend(Tile const& tile, StreamBox const& box, PackedTensor<Math> const& query,
              PackedTensor<Math> const& d_output, bool nonfinite, Bias const& bias, Memory const& memory,
              float* state) const {
    float const scale = static_cast<float>(problem_.scale) * kLog2e;
    Vec* const weights = memory.weights;
    Vec* const d_weights = memory.d_weights;
    int const max_tokens = chunk_tokens(2 * sizeof(Vec) + 4 * (query.sum.words + d_output.sum.words));
    for_each_chunk(tile, box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(memory.key_lanes, query.dot, chunk.token, chunk.rows, chunk.width, weights);
      dot_rows<Math>(memory.value_lanes, d_output.dot, chunk.token, chunk.rows, chunk.width, d_weights);
      int t = 0;
      for (int r = 0; r < chunk.rows; ++r) {
        UintVec const row_size = tile.row_size(chunk.z[r], chunk.y[r]);
        for (int i = 0; i < chunk.width; ++i, ++t) {
          QueryStats const& stats = memory.stats[chunk.token[r] + i];
          IntVec const keep = tile.keep(chunk.x + i, row_size);
          Vec logit = weights[t] * scale;
          if (bias) logit += bias.at(chunk.z[r], chunk.y[r], chunk.x + i, keep) * kLog2e;
          Vec const weight = keep ? exp2(logit - stats.lse2) : Vec{};
          Vec const d_logit = weight * (d_weights[t] - stats.delta);
          weights[t] = weight;
          d_weights[t] = keep ? d_logit : Vec{};
        }
      }
      accumulate_chunk<Math>(tile, chunk, query, nonfinite, d_weights, state, row_k_);
      accumulate_chunk<Math>(tile, chunk, d_output, nonfinite, weights, state + kLanes * row_k_, row_v_);
    });
  }

  void finish(Schedule::Item const& item, Tile const& tile, float const* state) const {
    auto const d_key = tile_view<Storage>(arguments_.d_key, arguments_.d_additional_keys, item);
    auto const d_value = tile_view<Storage>(arguments_.d_value, arguments_.d_additional_values, item);
    for (int l = 0; l < kLanes; ++l) {
      if (!tile.has(l)) continue;
      int const z = tile.position[0][l], y = tile.position[1][l], x = tile.position[2][l];
      store_row(d_key.at(z, y, x), state + l * row_k_, static_cast<float>(problem_.scale), problem_.head_dim);
      store_row(d_value.at(z, y, x), state + kLanes * row_k_ + l * row_v_, 1.0f, problem_.head_dim_value);
    }
  }

  BackwardArguments const& arguments_;
  Problem const& problem_;
  KeySource source_;
  Problem axes_;  // of the tile side
  int row_k_;
  int row_v_;
  std::int64_t words_k_;
  std::int64_t words_v_;
  std::int64_t max_packed_;
  Schedule schedule_;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
