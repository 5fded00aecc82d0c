// SPDX-License-Identifier: MIT
// The tiles that are streamed past a block's own tile: their order, and which of their tokens a row attends to.
#pragma once

#include "natten/cuda/collective/copy.hpp"

namespace natten::cuda {

// Tiles of one box of the streamed side.
struct Walk {
  TokenBox tokens;
  Interval interior[kMaxRank];  // what every row of the own tile attends to
  bool is_dense = false;        // every row attends to the whole box
  int count = 0;
  TokenView first, second;      // key and value, or query and the gradient of the output
  TokenView lse, delta;         // of streamed queries
  std::int64_t lap_first = 0, lap_second = 0;  // elements from one lap's tensors to the next's
  bool vectors_first = false, vectors_second = false;

  CUTE_DEVICE void count_tiles() {
    count = 1;
    for (int a = 0; a < kMaxRank; ++a) count *= ceil_div(tokens.box[a].size(), tokens.shape.side[a]);
  }
};

// A place on a sequence of laps.
struct Cursor {
  int origin[kMaxRank];
  int left = 0;  // tiles of this lap
  int lap = -1;

  CUTE_DEVICE void enter(Walk const& walk) {
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

}  // namespace natten::cuda
