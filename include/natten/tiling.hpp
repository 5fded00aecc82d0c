// SPDX-License-Identifier: MIT
// Cutting an axis into tiles: exact counts of what a tile visits, and the choice of tile shapes by them.
#pragma once

#include "natten/problem.hpp"

namespace natten {

// Key tiles that the query tiles of one group visit. A query tile's key tiles start at the corner of its own key box.
NATTEN_INLINE constexpr std::int64_t visited_tiles(Group const& group, int query_tile, int key_tile) {
  std::int64_t count = 0;
  for (int p = group.queries.begin; p < group.queries.end; p += query_tile) {
    Interval const keys = group.keys_of({p, min(p + query_tile, group.queries.end)});
    count += ceil_div(keys.size(), key_tile);
  }
  return count;
}

// Pairs of a query and a key that attends to it, on one group.
NATTEN_INLINE constexpr std::int64_t attended_pairs(Group const& group) {
  std::int64_t count = 0;
  for (int p = group.queries.begin; p < group.queries.end; ++p) count += group.window(p).size();
  return count;
}

// out[p - queries.begin] = window(p).
NATTEN_INLINE void fill_windows(Group const& group, Interval queries, Interval* out) {
  for (int p = queries.begin; p < queries.end; ++p) *out++ = group.window(p);
}

// out[j - keys.begin] = inverse(j). One sweep: both ends of the inverse window are non-decreasing in j.
NATTEN_INLINE void fill_inverse_windows(Group const& group, Interval keys, Interval* out) {
  if (keys.empty()) return;
  Interval queries = group.inverse(keys.begin);
  for (int j = keys.begin; j < keys.end; ++j) {
    while (queries.begin < group.queries.end && group.window(queries.begin).end <= j) ++queries.begin;
    while (queries.end < group.queries.end && group.window(queries.end).begin <= j) ++queries.end;
    *out++ = {queries.begin, max(queries.begin, queries.end)};
  }
}

// The side of the attention whose tokens make a tile; the other side is streamed past it.
enum class Side : int { kQuery = 0, kKey = 1 };

NATTEN_INLINE Interval tile_side(Group const& group, Side side) {
  return side == Side::kQuery ? group.queries : group.keys;
}
NATTEN_INLINE Interval stream_of(Group const& group, Side side, Interval tile) {
  return side == Side::kQuery ? group.keys_of(tile) : group.queries_of(tile);
}

// Sum over the tiles of an axis of the tokens streamed past each.
NATTEN_INLINE std::int64_t streamed_tokens(Group const& group, Side side, int tile) {
  Interval const tokens = tile_side(group, side);
  std::int64_t count = 0;
  for (int p = tokens.begin; p < tokens.end; p += tile) {
    count += stream_of(group, side, {p, min(p + tile, tokens.end)}).size();
  }
  return count;
}

// The box of `tokens` (a power of two) tokens that streams least; among equals the longest along the last axis, whose
// tokens are nearest in memory. Dilation groups differ by one token at most: the first speaks for all.
NATTEN_INLINE void choose_tile(Problem const& problem, Side side, int tokens, int (&shape)[kMaxRank]) {
  constexpr int kMaxLog = 8;
  double cost[kMaxRank][kMaxLog + 1] = {};
  int log = 0;
  while ((1 << log) < tokens) ++log;
  for (int a = 0; a < kMaxRank; ++a) {
    Group const group = problem.axes[a].group(0);
    for (int i = 0; i <= log; ++i) {
      cost[a][i] = static_cast<double>(streamed_tokens(group, side, 1 << i));
      if ((1 << i) >= tile_side(group, side).size()) {  // longer tiles only waste lanes
        for (int j = i + 1; j <= log; ++j) cost[a][j] = cost[a][i];
        break;
      }
    }
  }
  double best = -1;
  for (int i = 0; i <= log; ++i) {
    for (int j = 0; i + j <= log; ++j) {
      double const c = cost[0][i] * cost[1][j] * cost[2][log - i - j];
      if (best < 0 || c < best) {
        best = c;
        shape[0] = 1 << i;
        shape[1] = 1 << j;
        shape[2] = 1 << (log - i - j);
      }
    }
  }
}

// Whether windows are runs of one line of tokens, on the last axis.
NATTEN_INLINE bool has_lines(Problem const& problem) {
  return problem.axes[0].kernel_size == 1 && problem.axes[1].kernel_size == 1;
}

// Tiles of `lanes` queries in a row on the last axis whose keys slide: slot i of a lane is key begin + i of its own window, so
// that neither other axes nor the lanes' differing windows waste products.
struct SlidingCost {
  static constexpr int kMaxSlots = 64;  // of a row of a box: what longer windows waste is little in any tile
  bool possible = true;
  double products = 0;  // of a tile and a key, to be compared with the keys that tiles of another shape stream
};

NATTEN_INLINE SlidingCost sliding_cost(Problem const& problem, int lanes) {
  SlidingCost cost;
  Axis const& line = problem.axes[2];
  std::int64_t slots_of_first_group = 0;
  for (int g = 0; g < line.groups(); ++g) {
    Group const group = line.group(g);
    for (int p = group.queries.begin; p < group.queries.end; p += lanes) {
      int first = -1, slots = 0;
      for (int i = p; i < min(p + lanes, group.queries.end); ++i) {
        Interval const window = group.window(i);
        if (window.empty()) continue;
        if (first < 0) first = window.begin;
        slots = max(slots, window.size());
        // A lane's key is picked from a vector of those side by side.
        cost.possible = cost.possible && window.begin - first < lanes;
      }
      cost.possible = cost.possible && (has_lines(problem) || slots <= SlidingCost::kMaxSlots);
      if (g == 0) slots_of_first_group += slots;
    }
  }
  cost.products = static_cast<double>(slots_of_first_group);
  for (int a = 0; a < 2; ++a) {
    cost.products *= static_cast<double>(streamed_tokens(problem.axes[a].group(0), Side::kQuery, 1));
  }
  return cost;
}

// The shapes of own and streamed tiles, of these numbers of tokens (powers of two), with which own tiles visit the fewest
// streamed tiles: on each axis the sum over own tiles of those visited, multiplied over axes. Long axes are sampled, at
// kSamples tiles; dilation group 0 speaks for all. Among equals the longest along the last axis. Shapes in `fixed` that
// are not 0 are taken as they are.
inline TileShapes choose_tile_shapes(Problem const& problem, Side side, int own, int streamed,
                                     TileShapes const& fixed = {{0, 0, 0}, {0, 0, 0}}) {
  constexpr int kMaxLog = 8;
  constexpr int kSamples = 512;
  auto const log2 = [](int x) {
    int log = 0;
    while ((1 << log) < x) ++log;
    return log;
  };
  auto const may_be = [](int const(&shape)[kMaxRank], int i0, int i1, int i2) {
    return shape[0] == 0 || (shape[0] == 1 << i0 && shape[1] == 1 << i1 && shape[2] == 1 << i2);
  };
  int const own_log = log2(own), streamed_log = log2(streamed);
  double cost[kMaxRank][kMaxLog + 1][kMaxLog + 1] = {};
  for (int a = 0; a < kMaxRank; ++a) {
    Group const group = problem.axes[a].group(0);
    Interval const tokens = tile_side(group, side);
    for (int i = 0; i <= own_log; ++i) {
      int const tiles = ceil_div(tokens.size(), 1 << i);
      int const step = ceil_div(tiles, kSamples) > 0 ? ceil_div(tiles, kSamples) : 1;
      for (int t = 0; t < tiles; t += step) {
        int const begin = tokens.begin + (t << i);
        Interval const stream = stream_of(group, side, {begin, min(begin + (1 << i), tokens.end)});
        for (int j = 0; j <= streamed_log; ++j) cost[a][i][j] += double(step) * ceil_div(stream.size(), 1 << j);
      }
    }
  }
  TileShapes best;
  double least = -1;
  for (int i0 = 0; i0 <= own_log; ++i0) {
    for (int i1 = 0; i0 + i1 <= own_log; ++i1) {
      int const i2 = own_log - i0 - i1;
      if (!may_be(fixed.own, i0, i1, i2)) continue;
      for (int j0 = 0; j0 <= streamed_log; ++j0) {
        for (int j1 = 0; j0 + j1 <= streamed_log; ++j1) {
          int const j2 = streamed_log - j0 - j1;
          if (!may_be(fixed.streamed, j0, j1, j2)) continue;
          double const c = cost[0][i0][j0] * cost[1][i1][j1] * cost[2][i2][j2];
          if (least >= 0 && c >= least) continue;
          least = c;
          best = {{1 << i0, 1 << i1, 1 << i2}, {1 << j0, 1 << j1, 1 << j2}};
        }
      }
    }
  }
  return best;
}

// Fills problem.tiles. Costs a few evaluations of `window` a token: once for a problem, not once a call.
NATTEN_INLINE void choose_tiles(Problem& problem) {
  for (int side = 0; side < 2; ++side) {
    for (int i = 0; i < TileTable::kSizes; ++i) {
      choose_tile(problem, static_cast<Side>(side), TileTable::kSmallest << i, problem.tiles.shape[side][i]);
    }
  }
  constexpr int kLargest = TileTable::kSizes - 1;
  double streamed = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    int const size = problem.tiles.shape[static_cast<int>(Side::kQuery)][kLargest][a];
    streamed *= static_cast<double>(streamed_tokens(problem.axes[a].group(0), Side::kQuery, size));
  }
  SlidingCost const sliding = sliding_cost(problem, TileTable::kSmallest << kLargest);
  problem.tiles.queries_slide = sliding.possible && sliding.products <= streamed;  // among equals, too: 4 % faster
}

}  // namespace natten
