// SPDX-License-Identifier: MIT
// Cutting an axis into tiles: what is streamed past each.
#pragma once

#include "natten/problem.hpp"

namespace natten {

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

// Whether windows are runs of one line of tokens, on the last axis.
NATTEN_INLINE bool has_lines(Problem const& problem) {
  return problem.axes[0].kernel_size == 1 && problem.axes[1].kernel_size == 1;
}

// Slots of a row of a box, in tiles whose keys slide: what longer windows waste is little in any tile.
constexpr int kMaxSlidingSlots = 64;

// Fills problem.tiles, in some ten microseconds (src/dispatch/planning.cpp).
void choose_tiles(Problem& problem);

}  // namespace natten
