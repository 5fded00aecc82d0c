// SPDX-License-Identifier: MIT
// Fused neighborhood attention, backward, gradients of key and value: key tiles in lanes, and the queries of their inverse
// windows streamed. Every gradient is summed by one thread in one order: deterministic, no atomics.
//
// Where there is room for the sums, the gradient of the query is summed in the same pass: 5 products instead of 7.
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

  // `num_threads`: 1 keeps the keys of a head together. `with_query`: for run_with_query().
  GradKeyValue(GradArguments const& arguments, KeySource source, int num_threads, bool with_query = false)
      : arguments_(arguments),
        problem_(arguments.problem),
        levels_(problem_),
        source_(source),
        tiles_(source == KeySource::kWindow ? problem_ : line_of(problem_)),
        row_k_(round_up(problem_.head_dim, kLanes)),
        row_v_(round_up(problem_.head_dim_value, kLanes)),
        token_words_(PackedTensor<Math>::token_words(problem_.head_dim) +
                     PackedTensor<Math>::token_words(problem_.head_dim_value)),
        schedule_(tiles_, Side::kKey, 4 * token_words_ + sizeof(QueryStats), 4 * (row_k_ + row_v_),
                  /*allow_ring=*/source == KeySource::kWindow, /*may_slide=*/false, num_threads,
                  with_query ? 4 * row_k_ * problem_.group_size() : 0) {}

  void run() const {
    for_each_item(schedule_.items, arguments_.num_threads, [this](std::int64_t i) {
      Schedule::Item const item = schedule_.item(tiles_, i);
      if (item.empty) return;
      Walk const walk(schedule_, item, Math::kPerWord);
      Arena counter(nullptr);
      take_memory(counter, walk);
      Arena arena(thread_workspace(counter.used()));
      run_item(item, walk, take_memory(arena, walk), TokenSums(), nullptr);
    });
  }

  // With the gradients of the query and of the bias.
  void run_with_query() const {
    std::int64_t const items_per_head = schedule_.blocks_per_group() * schedule_.groups_per_head();  // and batch entry
    for_each_unit(arguments_, problem_.batch * items_per_head, [&](std::int64_t unit, int head_kv, float* d_bias) {
      run_unit((unit / items_per_head * problem_.heads_kv + head_kv) * items_per_head + unit % items_per_head, d_bias);
    });
  }

  // Whether there is work for every thread, and room for the sums of blocks that are not too narrow.
  bool can_run_with_query() const {
    return problem_.additional_keys == 0 && schedule_.has_ring && schedule_.can_complete_stream(tiles_) &&
           keeps_busy(arguments_.num_threads, schedule_.items);
  }

 private:
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
    Vec* key_lanes;  // [word][lane]
    Vec* value_lanes;  // [word][lane]
    Word* key_rows;  // [lane][channel]
    Vec* weights;  // [token][lane]
    Vec* d_weights;
    Vec* lane_weights;
    float* states;  // [tile][lane][row_k_ of dK / scale, then row_v_ of dV]
  };

  Memory take_memory(Arena& arena, Walk const& walk) const {
    std::int64_t const tokens = source_ == KeySource::kWindow ? walk.capacity() : schedule_.max_packed;
    Memory m;
    m.intervals = arena.take<Interval>(schedule_.positions());
    m.packed = arena.take<Word>(token_words_ * tokens);
    m.stats = arena.take<QueryStats>(tokens);
    m.key_lanes = arena.take<Vec>(row_k_);
    m.value_lanes = arena.take<Vec>(row_v_);
    m.key_rows = arena.take<Word>(operand_words(row_k_) * kLanes);
    m.weights = arena.take<Vec>(kMaxChunkTokens);
    m.d_weights = arena.take<Vec>(kMaxChunkTokens);
    m.lane_weights = arena.take<Vec>(Math::kPerWord > 1 ? kMaxChunkTokens : 0);
    m.states = arena.take<float>((is_one_piece(walk) ? 1 : schedule_.panels_per_step()) * state_floats());
    return m;
  }

  // A tile is finished before the next begins, and they share their state.
  bool is_one_piece(Walk const& walk) const {
    return source_ == KeySource::kWindow && walk.is_ring() && problem_.group_size() == 1;
  }

  std::int64_t state_floats() const { return std::int64_t{kLanes} * (row_k_ + row_v_); }

  template <class T>
  GroupView<T> tile_view(TensorRef const& window, TensorRef const& additional, Schedule::Item const& item) const {
    return source_ == KeySource::kWindow ? key_view<T>(problem_, window, item.groups, item.batch, item.head_kv)
                                         : additional_view<T>(additional, item.batch, item.head_kv);
  }

  // The same of the gradients.
  GroupView<Storage> result_view(TensorRef const& window, TensorRef const& additional, Schedule::Item const& item,
                                 int dim) const {
    return source_ == KeySource::kWindow
               ? key_result<Storage>(arguments_, window, item.groups, item.batch, item.head_kv, dim)
               : additional_view<Storage>(additional, item.batch, item.head_kv);
  }
  GroupView<Storage> d_key_of(Schedule::Item const& item) const {
    return result_view(arguments_.d_key, arguments_.d_additional_keys, item, problem_.head_dim);
  }
  GroupView<Storage> d_value_of(Schedule::Item const& item) const {
    return result_view(arguments_.d_value, arguments_.d_additional_values, item, problem_.head_dim_value);
  }

  void run_unit(std::int64_t index, float* d_bias) const {
    Schedule::Item const item = schedule_.item(tiles_, index);
    if (item.empty) return;
    Walk const walk(schedule_, item, Math::kPerWord);
    TokenSums sums;
    sums.row = row_k_;
    sums.ring = walk.ring();
    for (int a = 0; a < kMaxRank; ++a) sums.box[a] = stream_of(item.groups[a], Side::kKey, item.block[a]);
    Arena counter(nullptr);
    counter.take<float>(problem_.group_size() * sums.floats());
    take_memory(counter, walk);
    Arena arena(thread_workspace(counter.used()));
    sums.data = arena.take<float>(problem_.group_size() * sums.floats());
    run_item(item, walk, take_memory(arena, walk), sums, d_bias);
  }

  void clear_sums(TokenSums sums, Interval slices) const {
    for (int h = 0; h < problem_.group_size(); ++h, sums.data += sums.floats()) sums.clear(slices);
  }

  void store_sums(Schedule::Item const& item, TokenSums sums, Interval slices) const {
    for (int h = 0; h < problem_.group_size(); ++h, sums.data += sums.floats()) {
      auto const d_query = query_result<Storage>(arguments_, arguments_.d_query, item.groups, item.batch,
                                                 item.head_kv * problem_.group_size() + h, problem_.head_dim);
      Interval const tokens[kMaxRank] = {slices.clipped_to(item.share[0]), item.share[1], item.share[2]};
      sums.store(d_query, tokens, problem_.head_dim, static_cast<float>(problem_.scale));
    }
  }

  void run_item(Schedule::Item const& item, Walk const& walk, Memory const& memory, TokenSums const& sums,
                float* d_bias) const {
    bool const one_piece = is_one_piece(walk);
    AxisIntervals intervals[kMaxRank];
    if (source_ == KeySource::kWindow) fill_intervals(item, Side::kKey, memory.intervals, intervals);
    bool ring_nonfinite = false;
    Interval in_reach = {sums.box[0].begin, sums.box[0].begin};  // slices of the query whose sums are in the ring

    walk.for_each_step([&](Interval const(&block)[kMaxRank]) {
      if (sums) {
        move_reach(
            in_reach, walk.slices_of(block), [&](Interval slices) { clear_sums(sums, slices); },
            [&](Interval slices) { store_sums(item, sums, slices); });
      }
      auto const state_of = [&](int tile) { return memory.states + (one_piece ? 0 : tile) * state_floats(); };
      auto const clear = [&](float* state) { std::memset(state, 0, sizeof(float) * state_floats()); };
      if (!one_piece) {
        for_each_panel(block, schedule_.panel,
                       [&](int const(&)[kMaxRank], int tile_index) { clear(state_of(tile_index)); });
      }
      bool is_finished = false;
      for (int h = 0; h < problem_.group_size(); ++h) {
        int const head = item.head_kv * problem_.group_size() + h;
        TokenSums head_sums = sums;
        if (sums) head_sums.data += h * sums.floats();
        // Against one packed piece of queries.
        auto const visit = [&](Group const(&groups)[kMaxRank], StreamBox const& box, Interval slices) {
          QueryStream stream = packed(box, memory);
          bool const nonfinite = pack(groups, item.batch, head, stream, slices);
          ring_nonfinite = one_piece ? ring_nonfinite || nonfinite : nonfinite;
          stream.nonfinite = ring_nonfinite;
          for_each_panel(block, schedule_.panel, [&](int const(&corner)[kMaxRank], int tile_index) {
            Tile const tile(schedule_.tile, corner, block, intervals);
            float* const state = state_of(tile_index);
            if (one_piece) clear(state);
            bool const nonfinite_rows = load(item, tile, block, memory, /*as_rows=*/bool(sums));
            Bias const bias =
                source_ == KeySource::kWindow ? Bias(problem_, arguments_.rpb, head, tile, Side::kKey) : Bias();
            BiasGradient d_table;
            if (d_bias != nullptr) d_table = {d_bias + head * Bias::table_size(problem_), item.own_lanes(tile)};
            attend(tile, stream, bias, d_table, head_sums, nonfinite_rows, memory, state);
            if (one_piece) finish(item, tile, state);
          });
          is_finished = one_piece;
        };
        if (source_ == KeySource::kWindow) {
          walk.for_each_stream_piece(block, /*keeps_ring=*/one_piece,
                                     [&](StreamBox const& box, Interval slices) { visit(item.groups, box, slices); });
        } else {
          for_each_query_group([&](Group const(&groups)[kMaxRank]) {
            Interval const box[kMaxRank] = {groups[0].queries, groups[1].queries, groups[2].queries};
            fill_with(box, block, memory.intervals, intervals);
            for_each_piece(box, schedule_.max_packed, Math::kPerWord,
                           [&](StreamBox const& piece) { visit(groups, piece, piece.axis[0]); });
          });
        }
      }
      if (is_finished) return;
      Interval const nothing[kMaxRank] = {};
      if (source_ == KeySource::kAdditional) fill_with(nothing, block, memory.intervals, intervals);
      for_each_panel(block, schedule_.panel, [&](int const(&corner)[kMaxRank], int tile_index) {
        if (one_piece) clear(state_of(tile_index));  // keys that no query attends to
        finish(item, Tile(schedule_.tile, corner, block, intervals), state_of(tile_index));
      });
    });
    if (sums) store_sums(item, sums, in_reach);
  }

  template <class Visit>
  void for_each_query_group(Visit const& visit) const {
    Axis const(&axes)[kMaxRank] = problem_.axes;
    for (int z = 0; z < axes[0].groups(); ++z) {
      for (int y = 0; y < axes[1].groups(); ++y) {
        for (int x = 0; x < axes[2].groups(); ++x) {
          Group const groups[kMaxRank] = {axes[0].group(z), axes[1].group(y), axes[2].group(x)};
          visit(groups);
        }
      }
    }
  }

  // The same interval for every key.
  static void fill_with(Interval const (&box)[kMaxRank], Interval const (&block)[kMaxRank], Interval* memory,
                        AxisIntervals (&intervals)[kMaxRank]) {
    for (int a = 0; a < kMaxRank; ++a) {
      intervals[a] = {memory, block[a].begin};
      for (int i = 0; i < block[a].size(); ++i) *memory++ = box[a];
    }
  }

  struct QueryStream {
    StreamBox box;
    PackedTensor<Math> query;
    PackedTensor<Math> d_output;
    QueryStats* stats;
    bool nonfinite;
  };

  QueryStream packed(StreamBox const& box, Memory const& memory) const {
    Word* const d_output = memory.packed + PackedTensor<Math>::token_words(problem_.head_dim) * box.tokens();
    return {box, PackedTensor<Math>(memory.packed, problem_.head_dim, box.tokens()),
            PackedTensor<Math>(d_output, problem_.head_dim_value, box.tokens()), memory.stats, false};
  }

  bool pack(Group const (&groups)[kMaxRank], std::int64_t batch, int head, QueryStream const& stream,
            Interval slices) const {
    StreamBox const& box = stream.box;
    auto const view = [&](TensorRef const& tensor) {
      return query_view<Storage const>(problem_, tensor, groups, batch, head);
    };
    bool const q = stream.query.pack(view(arguments_.query), box, slices, /*as_dot=*/true, /*as_sum=*/true);
    bool const d = stream.d_output.pack(view(arguments_.d_output), box, slices, /*as_dot=*/true, /*as_sum=*/true);
    auto const output = view(arguments_.output);
    for (int z = slices.begin; z < slices.end; ++z) {
      for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
        QueryStats* row = stream.stats + box.token(z, y, box.first);
        for (int x = box.first; x < box.first + box.pitch; ++x) {
          if (x + kPrefetchTokens < box.axis[2].end)
            prefetch_token(output.at(z, y, x + kPrefetchTokens), problem_.head_dim_value);
          *row++ = box.axis[2].contains(x) ? query_stats<Storage>(arguments_, levels_, groups, batch, head, z, y, x)
                                           : QueryStats{0, kInfinity, 0};
        }
      }
    }
    return q || d;
  }

  bool load(Schedule::Item const& item, Tile const& tile, Interval const (&block)[kMaxRank], Memory const& memory,
            bool as_rows) const {
    auto const key = tile_view<Storage const>(arguments_.key, arguments_.additional_keys, item);
    auto const value = tile_view<Storage const>(arguments_.value, arguments_.additional_values, item);
    load_lanes<Math>(key, tile, problem_.head_dim, memory.key_lanes);
    load_lanes<Math>(value, tile, problem_.head_dim_value, memory.value_lanes);
    int const end = tile.box[2].end;
    Interval const next[kMaxRank] = {tile.box[0], tile.box[1], {end, min(end + schedule_.tile.size[2], block[2].end)}};
    FetchAhead fetch;
    fetch.start(Fetched(key, next, problem_.head_dim), Fetched(value, next, problem_.head_dim_value),
                Fetched(d_key_of(item), tile.box, problem_.head_dim),
                Fetched(d_value_of(item), tile.box, problem_.head_dim_value));
    fetch.all();
    return as_rows && load_lane_rows<Math>(key, tile, problem_.head_dim, key_rows(memory));
  }

  Operand key_rows(Memory const& memory) const {
    return Operand(memory.key_rows, problem_.head_dim, kLanes / Math::kPerWord);
  }

  void attend(Tile const& tile, QueryStream const& stream, Bias const& bias, BiasGradient d_bias, TokenSums const& sums,
              bool nonfinite_rows, Memory const& memory, float* state) const {
    Levels const levels = levels_;
    int const max_tokens = chunk_tokens(2 * sizeof(Vec) + 4 * (stream.query.sum.words + stream.d_output.sum.words));
    Vec* const weights = memory.weights;
    Vec* const d_weights = memory.d_weights;
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      dot_rows<Math>(memory.key_lanes, stream.query.dot, chunk.token, chunk.rows, chunk.width, weights);
      dot_rows<Math>(memory.value_lanes, stream.d_output.dot, chunk.token, chunk.rows, chunk.width, d_weights);
      int t = 0;
      for (int r = 0; r < chunk.rows; ++r) {
        UintVec const row_size = tile.row_size(chunk.z[r], chunk.y[r]);
        for (int i = 0; i < chunk.width; ++i, ++t) {
          QueryStats const& stats = stream.stats[chunk.token[r] + i];
          IntVec const x = chunk.first() + (chunk.x + i);
          IntVec const keep = tile.place(x) < row_size;
          Vec const level = levels.of(weights[t], bias, chunk.z[r], chunk.y[r], x, keep);
          Vec const weight = exp2((level - stats.origin) * levels.log2() - stats.lse2);
          Vec const d_logit = weight * (d_weights[t] - stats.delta);
          weights[t] = keep ? weight : Vec{};
          d_weights[t] = keep ? d_logit : Vec{};
          if (bias && d_bias.table != nullptr) bias.scatter(chunk.z[r], chunk.y[r], x, keep, d_weights[t], d_bias);
        }
      }
      if (sums) add_to_queries(tile, chunk, sums, nonfinite_rows, memory);
      FetchAhead nothing;
      accumulate_chunk<Math>(tile, chunk, stream.query, stream.nonfinite, d_weights, state, row_k_, nothing);
      accumulate_chunk<Math>(tile, chunk, stream.d_output, stream.nonfinite, weights, state + kLanes * row_k_, row_v_,
                             nothing);
    });
  }

  // sums[query] += sum over the tile's keys of ds * key. Lanes of a row that takes no part are skipped; the others' weights
  // are 0 where they do not attend.
  void add_to_queries(Tile const& tile, Chunk const& chunk, TokenSums const& sums, bool nonfinite,
                      Memory const& memory) const {
    constexpr int kTokens = Math::kPerWord;
    Operand const rows = key_rows(memory);
    Word const* const weights = Math::weights_by_lane(memory.d_weights, chunk.tokens(), memory.lane_weights);
    int lane_word[kLanes];
    for (int l = 0; l < kLanes; ++l) lane_word[l] = l;
    int const first = max(chunk.x, sums.box[2].begin);  // words may stick out of the box
    int const end = min(chunk.x + chunk.width, sums.box[2].end);
    for (int r = 0; r < chunk.rows; ++r) {
      Interval const lanes = tile.lanes_of_row(chunk.z[r], chunk.y[r]);
      Interval const words = {lanes.begin / kTokens, ceil_div(lanes.end, kTokens)};
      if (words.empty()) continue;
      float* const out = sums.at(chunk.z[r], chunk.y[r], first);
      auto const add = [&](int x, auto count) {
        WeightedRow const row{rows.data, weights + (r * chunk.width + x - chunk.x) * kLanes};
        accumulate_channels<Math, decltype(count)::value>(&row, 1, words, WeightsOfTokens{lane_word}, rows,
                                                          problem_.head_dim, out + (x - first) * row_k_, row_k_);
      };
      int x = first;
      if (nonfinite) {
        for (; x < end; ++x)
          add_exactly(tile, chunk.z[r], chunk.y[r], x, weights + (r * chunk.width + x - chunk.x) * kLanes, rows,
                      out + (x - first) * row_k_);
        continue;
      }
      for (; x + kMaxGroupLanes <= end; x += kMaxGroupLanes) add(x, std::integral_constant<int, kMaxGroupLanes>{});
      for (; x + 2 <= end; x += 2) add(x, std::integral_constant<int, 2>{});
      if (x < end) add(x, std::integral_constant<int, 1>{});
    }
  }

  // The same for one query, without multiplying keys that it does not attend to: 0 * inf must not reach it.
  void add_exactly(Tile const& tile, int z, int y, int x, Word const* weights, Operand const& rows, float* out) const {
    for (int l = 0; l < kLanes; ++l) {
      if (!tile.has(l) || !tile.takes_part(l, z, y, x)) continue;
      add_lane<Math>(rows, l, weights + l / Math::kPerWord, problem_.head_dim, out);
    }
  }

  void finish(Schedule::Item const& item, Tile const& tile, float const* state) const {
    std::uint32_t const own = item.own_lanes(tile);
    store_lanes(d_key_of(item), tile, own, problem_.head_dim, state, row_k_,
                [&](int) { return static_cast<float>(problem_.scale); });
    store_lanes(d_value_of(item), tile, own, problem_.head_dim_value, state + kLanes * row_k_, row_v_,
                [](int) { return 1.0f; });
  }

  GradArguments const& arguments_;
  Problem const& problem_;
  Levels levels_;
  KeySource source_;
  Problem tiles_;  // with the axes of the tile side
  int row_k_;
  int row_v_;
  std::int64_t token_words_;  // of a query and its output's gradient
  Schedule schedule_;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
