// SPDX-License-Identifier: MIT
// Counts of what tiles visit, and the choice of tile shapes by them. For the host, and not for files that are compiled for newer
// ISAs.
#pragma once

#include "natten/tiling.hpp"

namespace natten {

// Key tiles that the query tiles of one group visit. A query tile's key tiles start at the corner of its own key box.
constexpr std::int64_t visited_tiles(Group const& group, int query_tile, int key_tile) {
  std::int64_t count = 0;
  for (int p = group.queries.begin; p < group.queries.end; p += query_tile) {
    Interval const keys = group.keys_of({p, min(p + query_tile, group.queries.end)});
    count += ceil_div(keys.size(), key_tile);
  }
  return count;
}

// f(0) + ... + f(n - 1) of a function that grows by `step` wherever it is not held at its first or its last value.
template <class F>
constexpr std::int64_t sum_clamped_line(F const& f, int n, int step) {
  if (n <= 0) return 0;
  std::int64_t const first = f(0), last = f(n - 1);
  auto const first_where = [&](auto const& holds) {  // by binary search; n, if there is none
    int low = 0, high = n;
    while (low < high) {
      int const middle = low + (high - low) / 2;
      if (holds(f(middle))) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  std::int64_t const left = first_where([&](int x) { return x > first; });
  std::int64_t const reached = first_where([&](int x) { return x >= last; });
  if (left >= reached) return left * first + (n - left) * last;
  std::int64_t const between = reached - left;
  return left * first + between * f(static_cast<int>(left)) + step * (between * (between - 1) / 2) +
         (n - reached) * last;
}

// Pairs of a query and a key that attends to it, on one group: where windows begin and end moves with runs of `stride` queries, or,
// the end of causal ones, with every query.
constexpr std::int64_t attended_pairs(Group const& group) {
  int const begin = group.queries.begin, size = group.queries.size();
  if (size <= 0) return 0;
  int const stride = group.stride;
  int const place = begin - group.offset - floor_div(begin - group.offset, stride) * stride;  // in its run
  int const head = place == 0 ? 0 : min(size, stride - place);  // what is left of the first run
  int const runs = (size - head) / stride, tail = (size - head) % stride;
  auto const sum_of_runs = [&](auto const& f) {
    std::int64_t sum = stride * sum_clamped_line([&](int n) { return f(begin + head + n * stride); }, runs, stride);
    if (head > 0) sum += std::int64_t{head} * f(begin);
    if (tail > 0) sum += std::int64_t{tail} * f(group.queries.end - 1);
    return sum;
  };
  std::int64_t const begins = sum_of_runs([&](int p) { return group.window(p).begin; });
  if (!group.is_causal) return sum_of_runs([&](int p) { return group.window(p).end; }) - begins;
  return sum_clamped_line([&](int i) { return group.window(begin + i).end; }, size, 1) - begins;
}

// visit(group, count) for the dilation groups of an axis, of groups alike but for their index the first and how many there are: at
// most 6 kinds, as groups that follow have the same tokens or one less at an end.
template <class Visit>
inline void for_each_kind_of_group(Axis const& axis, Visit const& visit) {
  int const groups = axis.groups();
  for (int first = 0; first < groups;) {
    Group const group = axis.group(first);
    int low = first + 1, high = groups;  // the first group that differs
    while (low < high) {
      int const middle = low + (high - low) / 2;
      Group const other = axis.group(middle);
      bool const is_alike = other.length == group.length && other.queries == group.queries && other.keys == group.keys;
      if (is_alike) low = middle + 1;
      else high = middle;
    }
    visit(group, low - first);
    first = low;
  }
}

// Planning looks at no more tiles of an axis than these, so that it takes microseconds for any grid.
constexpr int kSamples = 64;

// visit(tile, count) for tiles of a group, each of which stands for `count`: all of a short group. The step is odd, so that tiles meet
// runs of queries with one window at all places.
template <class Visit>
inline void sample_tiles(Interval tokens, int tile, Visit const& visit) {
  int const tiles = ceil_div(tokens.size(), tile);
  int const step = tiles <= kSamples ? 1 : ceil_div(tiles, kSamples) | 1;
  for (int t = 0; t < tiles; t += step) {
    int const begin = tokens.begin + t * tile;
    visit(Interval{begin, begin + min(tile, tokens.end - begin)}, min(step, tiles - t));
  }
}

// Sum over the tiles of an axis of the tokens streamed past each, of long axes by samples.
inline std::int64_t streamed_tokens(Group const& group, Side side, int tile) {
  std::int64_t sum = 0;
  sample_tiles(tile_side(group, side), tile,
               [&](Interval own, int count) { sum += std::int64_t{count} * stream_of(group, side, own).size(); });
  return sum;
}

// Tokens that are streamed past the tiles of an axis, by the logarithm of their side. Dilation groups differ by one token at most:
// the first speaks for all.
struct TileCosts {
  static constexpr int kMaxLog = 4;  // of the largest box in TileTable
  static_assert(TileTable::kSmallest << (TileTable::kSizes - 1) == 1 << kMaxLog);
  double of[kMaxRank][kMaxLog + 1] = {};

  static TileCosts find(Problem const& problem, Side side) {
    TileCosts cost;
    for (int a = 0; a < kMaxRank; ++a) {
      Group const group = problem.axes[a].group(0);
      int const tokens = tile_side(group, side).size();
      for (int i = 0; i <= kMaxLog; ++i) {
        bool const is_longer = i > 0 && (1 << (i - 1)) >= tokens;  // which only wastes lanes
        cost.of[a][i] = is_longer ? cost.of[a][i - 1] : static_cast<double>(streamed_tokens(group, side, 1 << i));
      }
    }
    return cost;
  }

  // The box of 2^log tokens that streams least; among equals the longest along the last axis, whose tokens are nearest in memory.
  void choose(int log, int (&shape)[kMaxRank]) const {
    double best = -1;
    for (int i = 0; i <= log; ++i) {
      for (int j = 0; i + j <= log; ++j) {
        double const c = of[0][i] * of[1][j] * of[2][log - i - j];
        if (best < 0 || c < best) {
          best = c;
          shape[0] = 1 << i;
          shape[1] = 1 << j;
          shape[2] = 1 << (log - i - j);
        }
      }
    }
  }
};

// Tiles of `lanes` queries in a row on the last axis whose keys slide: slot i of a lane is key begin + i of its own window, so
// that neither other axes nor the lanes' differing windows waste products.
struct SlidingCost {
  bool possible = true;
  double products = 0;  // of a tile and a key, to be compared with the keys that tiles of another shape stream
};

// Whether windows of `lanes` neighbours always begin within a vector of so many keys, and, unless they are lines, have no more slots
// than sliding tiles take: a lane's key is picked from a vector of those side by side. Of grids with more tiles than are looked at
// one by one, what no border changes is decided: borders only hold windows back, and make them smaller.
inline bool can_slide(Problem const& problem, int lanes) {
  Axis const& line = problem.axes[2];
  bool const any_slots = has_lines(problem);
  constexpr int kLookedAt = 1024;
  bool const is_long =
      std::int64_t{line.groups()} * ceil_div(ceil_div(line.query_extent, line.dilation), lanes) > kLookedAt;
  bool possible = true;
  if (is_long) {
    if (!any_slots && line.kernel_size > kMaxSlidingSlots) return false;
    int step = lanes,
        common = line.stride;  // their greatest common divisor: tiles begin at all places of a run that it divides
    while (step != 0) {
      int const rest = common % step;
      common = step;
      step = rest;
    }
    for_each_kind_of_group(line, [&](Group const& group, int) {
      int const place = group.queries.begin - group.offset;
      int const last = place - floor_div(place, common) * common + line.stride - common;
      possible = possible && (last + lanes - 1) / line.stride * line.stride < lanes;
    });
    return possible;
  }
  for_each_kind_of_group(line, [&](Group const& group, int) {
    for (int p = group.queries.begin; p < group.queries.end; p += lanes) {
      int first = -1;
      for (int i = p; i < min(p + lanes, group.queries.end); ++i) {
        Interval const window = group.window(i);
        if (window.empty()) continue;
        if (first < 0) first = window.begin;
        possible = possible && window.begin - first < lanes;
        possible = possible && (any_slots || window.size() <= kMaxSlidingSlots);
      }
    }
  });
  return possible;
}

inline SlidingCost sliding_cost(Problem const& problem, int lanes) {
  SlidingCost cost;
  cost.possible = can_slide(problem, lanes);
  if (!cost.possible) return cost;
  Group const group = problem.axes[2].group(0);
  sample_tiles(group.queries, lanes, [&](Interval tile, int count) {
    int slots = 0;
    for (int p = tile.begin; p < tile.end; ++p) slots = max(slots, group.window(p).size());
    cost.products += static_cast<double>(count) * slots;
  });
  for (int a = 0; a < 2; ++a) {
    cost.products *= static_cast<double>(streamed_tokens(problem.axes[a].group(0), Side::kQuery, 1));
  }
  return cost;
}

// The shapes of own and streamed tiles, of these numbers of tokens (powers of two), with which own tiles visit the fewest
// streamed tiles: on each axis the sum over own tiles of those visited, multiplied over axes; long axes are sampled. Dilation
// group 0 speaks for all. Among equals the longest along the last axis. Shapes in `fixed` that are not 0 are taken as they
// are.
inline TileShapes choose_tile_shapes(Problem const& problem, Side side, int own, int streamed,
                                     TileShapes const& fixed = {{0, 0, 0}, {0, 0, 0}}) {
  constexpr int kMaxLog = 8;
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
    for (int i = 0; i <= own_log; ++i) {
      sample_tiles(tile_side(group, side), 1 << i, [&](Interval tile, int count) {
        int const stream = stream_of(group, side, tile).size();
        for (int j = 0; j <= streamed_log; ++j) cost[a][i][j] += double(count) * ceil_div(stream, 1 << j);
      });
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

}  // namespace natten
