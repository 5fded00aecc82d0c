// SPDX-License-Identifier: MIT
// Unfused weighted sums of queries: key tiles in lanes, and the queries of their inverse windows streamed, as in the fused
// gradients of key and value. What a query has for neighbouring keys is side by side in memory: weights are read straight
// into lanes. Every key is summed by one thread in one order.
#pragma once

#include "natten/cpu/weights.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

template <class Math>
class AvTransposed {
 public:
  using Storage = typename Math::Storage;

  explicit AvTransposed(UnfusedArguments const& arguments)
      : arguments_(arguments),
        problem_(arguments.problem),
        row_(round_up(problem_.head_dim, kLanes)),
        token_words_(PackedTensor<Math>::token_words(problem_.head_dim)),
        schedule_(problem_, Side::kKey, 4 * token_words_, 4 * row_, /*allow_ring=*/true, /*may_slide=*/false,
                  arguments.num_threads) {}

  void run() const {
    for_each_item(schedule_.items, arguments_.num_threads, [this](std::int64_t i) {
      Schedule::Item const item = schedule_.item(problem_, i);
      if (item.empty) return;
      Walk const walk(schedule_, item, Math::kPerWord);
      Arena counter(nullptr);
      take_memory(counter, item, walk);
      Arena arena(thread_workspace(counter.used()));
      run_item(item, walk, take_memory(arena, item, walk));
    });
  }

 private:
  // A position of queries on the last axis: which lanes they attend to, and where in a row their weights for token 0 would
  // begin.
  struct Column {
    IntVec keep;
    std::int64_t offset;
  };

  // Neighbouring lanes along the last axis, and where the weights of lane 0 would be, if they went on before those of the
  // first of them.
  struct LaneRun {
    IntVec lanes;
    std::int64_t offset;
  };

  struct Memory {
    Interval* intervals;
    Interval* windows;
    Word* packed;
    Vec* weights;  // [token][lane]
    Column* columns;
    float* states;  // [tile][lane][row_]
  };

  // The queries of one head, packed, and the rows of their weights.
  struct QueryStream {
    StreamBox box;
    PackedTensor<Math> query;
    GroupView<Storage const> weights;
    AxisIntervals const (&windows)[kMaxRank];
    bool nonfinite;
  };

  Memory take_memory(Arena& arena, Schedule::Item const& item, Walk const& walk) const {
    int queries = 0;
    for (int a = 0; a < kMaxRank; ++a) queries += stream_of(item.groups[a], Side::kKey, item.block[a]).size();
    Memory m;
    m.intervals = arena.take<Interval>(schedule_.positions());
    m.windows = arena.take<Interval>(queries);
    m.packed = arena.take<Word>(token_words_ * walk.capacity());
    m.weights = arena.take<Vec>(kMaxChunkTokens);
    m.columns = arena.take<Column>(kMaxChunkTokens);
    m.states = arena.take<float>((is_one_piece(walk) ? 1 : schedule_.panels_per_step()) * state_floats());
    return m;
  }

  // A tile is finished before the next begins, and they share their state.
  bool is_one_piece(Walk const& walk) const { return walk.is_ring() && problem_.group_size() == 1; }
  std::int64_t state_floats() const { return std::int64_t{kLanes} * row_; }

  void run_item(Schedule::Item const& item, Walk const& walk, Memory const& memory) const {
    bool const one_piece = is_one_piece(walk);
    AxisIntervals intervals[kMaxRank], windows[kMaxRank];
    fill_intervals(item, Side::kKey, memory.intervals, intervals);
    Interval* free = memory.windows;
    for (int a = 0; a < kMaxRank; ++a) {
      Interval const queries = stream_of(item.groups[a], Side::kKey, item.block[a]);
      windows[a] = {free, queries.begin};
      fill_windows(item.groups[a], queries, free);
      free += queries.size();
    }
    bool nonfinite = false;

    walk.for_each_step([&](Interval const(&block)[kMaxRank]) {
      auto const for_each_state = [&](auto const& use) {
        for_each_panel(block, schedule_.panel, [&](int const(&corner)[kMaxRank], int index) {
          use(Tile(schedule_.tile, corner, block, intervals), memory.states + (one_piece ? 0 : index) * state_floats());
        });
      };
      auto const clear = [&](float* state) { std::memset(state, 0, sizeof(float) * state_floats()); };
      bool is_finished = false;
      if (!one_piece) for_each_state([&](Tile const&, float* state) { clear(state); });
      for (int h = 0; h < problem_.group_size(); ++h) {
        int const head = item.head_kv * problem_.group_size() + h;
        walk.for_each_stream_piece(block, /*keeps_ring=*/one_piece, [&](StreamBox const& box, Interval slices) {
          PackedTensor<Math> const query(memory.packed, problem_.head_dim, box.tokens());
          auto const rows = query_view<Storage const>(problem_, arguments_.query, item.groups, item.batch, head);
          bool const is_new = query.pack(rows, box, slices, /*as_dot=*/false, /*as_sum=*/true);
          nonfinite = one_piece ? nonfinite || is_new : is_new;
          QueryStream const stream{
              box, query, query_view<Storage const>(problem_, arguments_.weights, item.groups, item.batch, head),
              windows, nonfinite};
          for_each_state([&](Tile const& tile, float* state) {
            if (one_piece) clear(state);
            attend(tile, stream, memory, state);
            if (one_piece) finish(item, tile, state);
          });
          is_finished = one_piece;
        });
      }
      if (is_finished) return;
      for_each_state([&](Tile const& tile, float* state) {
        if (one_piece) clear(state);  // keys that no query attends to
        finish(item, tile, state);
      });
    });
  }

  void attend(Tile const& tile, QueryStream const& stream, Memory const& memory, float* state) const {
    Interval const streamed = tile.stream[2].clipped_to(stream.box.axis[2]);
    int const max_tokens = chunk_tokens(sizeof(Vec) + 4 * stream.query.sum.words);
    // From a weight to that of the key in the next row, or on a line in the next tile.
    int const next = problem_.rank > 1 ? problem_.axes[2].kernel_size : kLanes;
    for_each_chunk(tile, stream.box, max_tokens, Math::kPerWord, [&](Chunk const& chunk) {
      for (int i = 0; i < chunk.width; ++i) {
        int const x = chunk.x + i;
        bool const has = streamed.contains(x);
        memory.columns[i].keep = has ? tile.place(broadcast(x)) < tile.size[2] : IntVec{};
        memory.columns[i].offset = has ? x * stream.weights.step[2] - stream.windows[2][x].begin : 0;
      }
      Vec* weights = memory.weights;
      LaneRun runs[kLanes];
      for (int r = 0; r < chunk.rows; ++r) {
        int const num_runs = find_runs(tile, stream.windows, chunk.z[r], chunk.y[r], runs);
        Storage const* const row = stream.weights.at(chunk.z[r], chunk.y[r], 0);
        for (int i = 0; i < chunk.width; ++i, ++weights) {
          Column const& column = memory.columns[i];
          *weights = Vec{};
          for (int k = 0; k < num_runs; ++k) {
            Storage const* const from = row + (column.offset + runs[k].offset);
            __builtin_prefetch(from + next + kLanes - 1, /*rw=*/0, /*locality=*/2);
            *weights += load_where(column.keep & runs[k].lanes, from);
          }
        }
      }
      FetchAhead nothing;
      accumulate_chunk<Math>(tile, chunk, stream.query, stream.nonfinite, memory.weights, state, row_, nothing);
    });
  }

  // The runs of lanes that the queries of a stream row may attend to.
  int find_runs(Tile const& tile, AxisIntervals const (&windows)[kMaxRank], int z, int y, LaneRun* runs) const {
    int const length = tile.shape->size[2];
    int count = 0;
    for (int l = 0; l < kLanes; l += length) {
      if (!tile.lane_interval(0, l).contains(z) || !tile.lane_interval(1, l).contains(y)) continue;
      int const slot_z = tile.position[0][l] - windows[0][z].begin;
      int const slot_y = tile.position[1][l] - windows[1][y].begin;
      std::int64_t const row = std::int64_t{slot_z} * problem_.axes[1].kernel_size + slot_y;
      runs[count++] = {lanes_in(l, l + length), row * problem_.axes[2].kernel_size + tile.position[2][l] - l};
    }
    return count;
  }

  void finish(Schedule::Item const& item, Tile const& tile, float const* state) const {
    auto const key =
        key_result<Storage>(arguments_, arguments_.key, item.groups, item.batch, item.head_kv, problem_.head_dim);
    store_lanes(key, tile, problem_.head_dim, state, row_, [](int) { return 1.0f; });
  }

  UnfusedArguments const& arguments_;
  Problem const& problem_;
  int row_;  // floats of a lane's sum
  std::int64_t token_words_;
  Schedule schedule_;
};

// Lanes along the last axis, as far as it goes: a query's weights for a tile are then one run, or few.
inline void lay_lanes_along_rows(Problem& problem) {
  int left = kLanes;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    int const tokens = tile_side(problem.axes[a].group(0), Side::kKey).size();
    int size = 1;
    while (size < left && (a == 0 || size < tokens)) size *= 2;
    problem.tiles.shape[static_cast<int>(Side::kKey)][kTileTableIndex][a] = size;
    left /= size;
  }
}

template <class Storage>
void gemm_av_transposed(UnfusedArguments const& original) {
  using Math = typename MathFor<Storage>::Type;
  UnfusedArguments arguments = original;
  put_walk_axis_first(arguments.problem, arguments.query, arguments.key, arguments.weights);
  lay_lanes_along_rows(arguments.problem);
  AvTransposed<Math>(arguments).run();
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
