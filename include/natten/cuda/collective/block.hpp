// SPDX-License-Identifier: MIT
// What one thread block works on: a tile of its own, and what is streamed past it. Found once for a tile and kept in
// shared memory.
#pragma once

#include "natten/cuda/collective/walk.hpp"
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

  // `item` of the tiles of additional keys.
  CUTE_DEVICE void locate_additional(Partition const& partition, int additional_keys, std::int64_t item) {
    int const tiles = ceil_div(additional_keys, partition.own_additional.side[kMaxRank - 1]);
    head = static_cast<int>(item % partition.heads);
    item /= partition.heads;
    batch = item / tiles;
    tokens.shape = partition.own_additional;
    is_empty = false;
    for (int a = 0; a < kMaxRank; ++a) {
      group[a] = 0;
      tokens.box[a] = {0, 1};
      origin[a] = 0;
    }
    tokens.box[kMaxRank - 1].end = additional_keys;
    origin[kMaxRank - 1] = static_cast<int>(item % tiles) * tokens.shape.side[kMaxRank - 1];
  }
};

// What a block keeps in shared memory besides tiles.
template <int kOwn, int kStreamed, int kWalks>
struct BlockState {
  Own own;
  Walk walks[kWalks];
  Interval windows[kMaxRank][kOwn];  // of the own tile's tokens, by their place on an axis
  int bias_row[kOwn];                // index of the bias table: row + column + place of the streamed tile
  int bias_column[kStreamed];

  // Forward, and for the gradient of the query: a lap of the window's keys, then one of the additional keys. For the
  // gradients of key and value: a lap of queries for each head that reads this key.
  int laps;
  int tiles;  // of all laps

  CUTE_DEVICE Walk const& walk_of(Cursor const& cursor) const { return walks[kWalks == 1 ? 0 : cursor.lap]; }
  CUTE_DEVICE Cursor first_tile() const {
    Cursor cursor;
    skip_empty(cursor);
    return cursor;
  }
  CUTE_DEVICE void next_tile(Cursor& cursor) const {
    cursor.advance(walk_of(cursor));
    skip_empty(cursor);
  }
  CUTE_DEVICE void skip_empty(Cursor& cursor) const {
    while (cursor.left == 0 && cursor.lap + 1 < laps) {
      ++cursor.lap;
      cursor.enter(walk_of(cursor));
    }
  }

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

// The own tile of `item`, the box of the first walk, and the windows of the own tokens. All threads call it; what it
// found is there for all when it returns.
template <Side kSide, int kThreads, class State>
CUTE_DEVICE void find_block(State& state, Partition const& partition, Problem const& problem, std::int64_t item,
                            int thread) {
  if (thread == 0) state.own.locate(partition, item);
  __syncthreads();
  Walk& walk = state.walks[0];
  if (thread < kMaxRank) {
    int const a = thread;
    Group const group = problem.axes[a].group(state.own.group[a]);
    Interval const tokens = tile_side(group, kSide);
    int const begin = state.own.origin[a] + tokens.begin;
    Interval const tile{begin, min(begin + partition.own.side[a], tokens.end)};
    state.own.origin[a] = begin;
    state.own.tokens.box[a] = tokens;
    walk.tokens.box[a] = walk.interior[a] = {0, 0};
    if (!tile.empty()) {
      walk.tokens.box[a] = stream_of(group, kSide, tile);
      walk.interior[a] = kSide == Side::kQuery ? group.interior_keys_of(tile) : group.interior_queries_of(tile);
    }
  }
  __syncthreads();
  for (int a = 0; a < kMaxRank; ++a) {
    Group const group = problem.axes[a].group(state.own.group[a]);
    for (int i = thread; i < state.own.tokens.shape.side[a]; i += kThreads) {
      int const p = state.own.origin[a] + i;
      Interval window;  // empty for a token that is not there
      if (p < state.own.tokens.box[a].end) window = kSide == Side::kQuery ? group.window(p) : group.inverse(p);
      state.windows[a][i] = window;
    }
  }
  if (thread == 0) {
    state.own.is_empty = false;
    for (int a = 0; a < kMaxRank; ++a) {
      state.own.is_empty = state.own.is_empty || state.own.origin[a] >= state.own.tokens.box[a].end;
    }
    walk.tokens.shape = partition.streamed;
    walk.is_dense = false;
    walk.count_tiles();
  }
  __syncthreads();
}

// A whole run of tokens that every row attends to.
CUTE_DEVICE void make_dense(Walk& walk, TileShape const& shape, Interval const (&box)[kMaxRank]) {
  walk.tokens.shape = shape;
  for (int a = 0; a < kMaxRank; ++a) walk.tokens.box[a] = walk.interior[a] = box[a];
  walk.is_dense = true;
  walk.count_tiles();
}

// The bias table's index of an element is bias_row + bias_column + bias_tile(origin of the streamed tile).
template <Side kSide, int kThreads, class State>
CUTE_DEVICE void find_bias(State& state, BiasIndex const& bias, int thread) {
  constexpr int kSign = kSide == Side::kQuery ? -1 : 1;  // of the own side's positions
  int const corner = bias.corner + kSign * bias.of_position(state.own.origin);
  for (int i = thread; i < int(sizeof(state.bias_row) / sizeof(int)); i += kThreads) {
    state.bias_row[i] = corner + kSign * bias.of_token(state.own.tokens.shape, i);
  }
  for (int i = thread; i < int(sizeof(state.bias_column) / sizeof(int)); i += kThreads) {
    state.bias_column[i] = -kSign * bias.of_token(state.walks[0].tokens.shape, i);
  }
}

// Views of a side's tensors, in the own tile's dilation group.
template <Side kSide, class T>
CUTE_DEVICE TokenView view_of(TensorRef const& tensor, Problem const& problem, Own const& own, int head) {
  int dilation[kMaxRank], origin[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    dilation[a] = problem.axes[a].dilation;
    origin[a] = kSide == Side::kQuery ? problem.axes[a].query_origin : problem.axes[a].key_origin;
  }
  return view_of<T>(tensor, own.batch, head, own.group, dilation, origin);
}

// And of tensors whose positions are tokens.
template <class T>
CUTE_DEVICE TokenView plain_view_of(TensorRef const& tensor, Own const& own, int head,
                                    int const (&origin)[kMaxRank] = {0, 0, 0}) {
  int const zeros[kMaxRank] = {0, 0, 0}, ones[kMaxRank] = {1, 1, 1};
  return view_of<T>(tensor, own.batch, head, zeros, ones, origin);
}

}  // namespace natten::cuda
