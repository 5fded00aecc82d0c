// SPDX-License-Identifier: MIT
// What one thread block works on: a tile of its own, and the tiles of the other side that are streamed past it. Found
// once for a block and kept in shared memory.
#pragma once

#include "natten/cuda/collective/copy.hpp"
#include "natten/cuda/library.hpp"
#include "natten/tiling.hpp"

namespace natten::cuda {

// How a side of the attention is cut into tiles, and in which order blocks take them: heads run fastest, because heads
// that share keys (GQA) then share them in the cache too.
struct Partition {
  TileShape own, streamed;
  TileShape own_additional, streamed_additional;  // the same numbers of tokens along the last axis
  int groups[kMaxRank];
  int tiles[kMaxRank];  // of the largest group
  int heads;
  std::int64_t items;   // tiles of all heads, groups and samples

  // A grid has at most 2^31 - 1 blocks, each of which takes every blocks()-th item.
  std::int64_t blocks() const { return items < 0x7fffffff ? items : 0x7fffffff; }

  static Partition make(Problem const& problem, Side side, TileShapes const& shapes) {
    Partition p;
    p.own = TileShape::make(shapes.own);
    p.streamed = TileShape::make(shapes.streamed);
    p.own_additional = TileShape::make({1, 1, p.own.tokens()});
    p.streamed_additional = TileShape::make({1, 1, p.streamed.tokens()});
    p.heads = side == Side::kQuery ? problem.heads : problem.heads_kv;
    p.items = problem.batch * p.heads;
    for (int a = 0; a < kMaxRank; ++a) {
      Axis const& axis = problem.axes[a];
      int const extent = side == Side::kQuery ? axis.query_extent : axis.key_extent;
      p.groups[a] = axis.groups();
      p.tiles[a] = ceil_div(ceil_div(extent, axis.dilation), p.own.side[a]);
      p.items *= std::int64_t{p.groups[a]} * p.tiles[a];
    }
    return p;
  }
};

// Tiles of one box of the streamed side.
struct Walk {
  TokenBox tokens;
  Interval interior[kMaxRank];  // what every row of the own tile attends to
  bool is_dense = false;        // every row attends to the whole box
  int count = 0;
  TokenView first, second;      // key and value, or query and the gradient of the output
  bool vectors_first = false, vectors_second = false;

  CUTE_DEVICE void count_tiles() {
    count = 1;
    for (int a = 0; a < kMaxRank; ++a) count *= ceil_div(tokens.box[a].size(), tokens.shape.side[a]);
  }
};

// A place on a sequence of walks.
struct Cursor {
  int origin[kMaxRank];
  int left = 0;  // tiles of this lap
  int lap = -1;

  CUTE_DEVICE void enter(Walk const& walk) {
    ++lap;
    left = walk.count;
    for (int a = 0; a < kMaxRank; ++a) origin[a] = walk.tokens.box[a].begin;
  }
  CUTE_DEVICE void advance(Walk const& walk) {
    --left;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      origin[a] += walk.tokens.shape.side[a];
      if (a == 0 || origin[a] < walk.tokens.box[a].end) break;
      origin[a] = walk.tokens.box[a].begin;
    }
  }
  CUTE_DEVICE bool is_interior(Walk const& walk) const {
    bool interior = true;
    for (int a = 0; a < kMaxRank; ++a) {
      interior = interior && walk.interior[a].contains({origin[a], origin[a] + walk.tokens.shape.side[a]});
    }
    return interior;
  }
};

// Of a block's own tile.
struct Own {
  std::int64_t batch;
  int head;
  int group[kMaxRank];
  int origin[kMaxRank];
  TokenBox tokens;
  bool is_empty;  // a group may have one tile less than the largest has

  CUTE_DEVICE void locate(Partition const& partition, std::int64_t item) {
    head = static_cast<int>(item % partition.heads);
    item /= partition.heads;
    int tile[kMaxRank];
    for (int a = kMaxRank - 1; a >= 0; --a) {
      tile[a] = static_cast<int>(item % partition.tiles[a]);
      item /= partition.tiles[a];
    }
    for (int a = kMaxRank - 1; a >= 0; --a) {
      group[a] = static_cast<int>(item % partition.groups[a]);
      item /= partition.groups[a];
    }
    batch = item;
    tokens.shape = partition.own;
    for (int a = 0; a < kMaxRank; ++a) origin[a] = tile[a] * partition.own.side[a];
  }
};

// Word of bits, one for each column of a streamed tile: attended or not.
template <int kStreamed>
using ColumnWord = conditional_t<(kStreamed <= 32), std::uint32_t, std::uint64_t>;

template <class Word>
CUTE_DEVICE Word bits_below(int end) {
  return end >= int(8 * sizeof(Word)) ? ~Word(0) : (Word(1) << end) - 1;
}

// Columns of the tile at `origin` that lie in all three intervals. On one axis these are a run of bits, repeated for
// each token of the axes outside it.
template <class Word>
CUTE_DEVICE Word columns_within(Interval const (&intervals)[kMaxRank], TileShape const& shape,
                                int const (&origin)[kMaxRank]) {
  Word columns = ~Word(0);
  for (int a = 0; a < kMaxRank; ++a) {
    int const begin = clamp(intervals[a].begin - origin[a], 0, shape.side[a]);
    int const end = clamp(intervals[a].end - origin[a], begin, shape.side[a]);
    Word const run = bits_below<Word>(end << shape.shift[a]) & ~bits_below<Word>(begin << shape.shift[a]);
    columns &= run * static_cast<Word>(shape.repeat[a]);
  }
  return columns;
}

// What a block keeps in shared memory besides tiles.
template <int kOwn, int kStreamed, int kWalks>
struct BlockState {
  Own own;
  Walk walks[kWalks];
  Interval windows[kMaxRank][kOwn];  // of the own tile's tokens, by their place on an axis
  int bias_row[kOwn];                // index of the bias table: row + column + place of the streamed tile
  int bias_column[kStreamed];

  CUTE_DEVICE ColumnWord<kStreamed> columns_of(int row, Walk const& walk, int const (&origin)[kMaxRank]) const {
    Interval attended[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      attended[a] = walk.is_dense ? walk.tokens.box[a] : windows[a][own.tokens.shape.at(row, a)];
    }
    return columns_within<ColumnWord<kStreamed>>(attended, walk.tokens.shape, origin);
  }
};

// The bias table's entry is (key - query + kernel_size - 1) on each axis: `sign` is 1 for positions of keys and -1 for
// those of queries.
struct BiasIndex {
  int stride[kMaxRank];
  int corner;  // of equal positions
  int entries; // of a head

  static BiasIndex make(Problem const& problem) {
    BiasIndex index;
    index.corner = 0;
    index.entries = 1;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      index.stride[a] = index.entries;
      index.corner += (problem.axes[a].kernel_size - 1) * index.entries;
      index.entries *= 2 * problem.axes[a].kernel_size - 1;
    }
    return index;
  }

  CUTE_DEVICE int of_position(int const (&p)[kMaxRank]) const {
    return p[0] * stride[0] + p[1] * stride[1] + p[2] * stride[2];
  }
  CUTE_DEVICE int of_token(TileShape const& shape, int token) const {
    return shape.at(token, 0) * stride[0] + shape.at(token, 1) * stride[1] + shape.at(token, 2) * stride[2];
  }
};

// Where a block stands on one axis: its own tile, and what is streamed past it. Threads 0 to 2 each find one axis.
template <Side kSide, class State>
CUTE_DEVICE void find_axis(State& state, Partition const& partition, Axis const& axis, int a) {
  Group const group = axis.group(state.own.group[a]);
  Interval const tokens = tile_side(group, kSide);
  int const begin = state.own.origin[a] + tokens.begin;
  Interval const tile{begin, min(begin + partition.own.side[a], tokens.end)};
  state.own.origin[a] = begin;
  state.own.tokens.box[a] = tokens;
  Walk& walk = state.walks[0];
  walk.tokens.box[a] = {0, 0};
  if (tile.empty()) return;
  walk.tokens.box[a] = stream_of(group, kSide, tile);
  walk.interior[a] = kSide == Side::kQuery ? group.interior_keys_of(tile) : group.interior_queries_of(tile);
}

// The windows (or inverse windows) of an own tile's tokens, along one axis after the other. Those of tokens that are
// not there are empty.
template <Side kSide, int kThreads, class State>
CUTE_DEVICE void find_windows(State& state, Problem const& problem, int thread) {
  for (int a = 0; a < kMaxRank; ++a) {
    Group const group = problem.axes[a].group(state.own.group[a]);
    for (int i = thread; i < state.own.tokens.shape.side[a]; i += kThreads) {
      int const p = state.own.origin[a] + i;
      Interval window;
      if (p < state.own.tokens.box[a].end) window = kSide == Side::kQuery ? group.window(p) : group.inverse(p);
      state.windows[a][i] = window;
    }
  }
}

}  // namespace natten::cuda
