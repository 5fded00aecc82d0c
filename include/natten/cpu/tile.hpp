// SPDX-License-Identifier: MIT
// A tile: a box of kLanes tokens, one a lane, against the boxes of the stream side that they attend to (or, for dK and
// dV, that attend to them). Kernels walk those boxes in chunks of rows.
#pragma once

#include "natten/cpu/fetch.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// A chunk's weighted sums read its values once a group of lanes: they, and the scores, should stay in the L1 cache. 128
// tokens of head_dim 64 in float do; with 288 a window of 13 x 13 takes a quarter longer.
constexpr int kChunkBytes = 40 << 10;
constexpr int kMinChunkTokens = 32;
constexpr int kMaxChunkTokens = 240;  // whole runs: a long row is cut at multiples of them
static_assert(kMaxChunkTokens % (2 * kMaxRun) == 0, "rounding a width up to whole runs must not exceed the maximum");

NATTEN_INLINE int chunk_tokens(std::int64_t bytes_per_token, int chunk_bytes = kChunkBytes) {
  return clamp(static_cast<int>(chunk_bytes / bytes_per_token), kMinChunkTokens, kMaxChunkTokens);
}

// Lanes that share one weighted sum: pairs waste least on the border of windows, fours load least.
constexpr int kMaxGroupLanes = kRegisters == 32 ? 4 : 2;
constexpr int kPairPenalty = 130;  // cost of a token's weighted sum in a pair, in percent of that in a four

// The box of a tile, and where in it each lane's token is.
struct TileShape {
  int size[kMaxRank] = {1, 1, kLanes};
  int place[kMaxRank][kLanes];              // of a lane's token in the box
  IntVec places[kMaxRank];                  // the same
  std::uint32_t below[kMaxRank][kLanes + 1];  // lanes whose place on the axis is below n

  TileShape() : TileShape({1, 1, kLanes}) {}
  explicit TileShape(int const (&shape)[kMaxRank]) : size{shape[0], shape[1], shape[2]} {
    for (int l = 0; l < kLanes; ++l) {
      int const at[kMaxRank] = {l / (size[1] * size[2]), l / size[2] % size[1], l % size[2]};
      for (int a = 0; a < kMaxRank; ++a) {
        place[a][l] = at[a];
        places[a][l] = at[a];
      }
    }
    for (int a = 0; a < kMaxRank; ++a) {
      for (int n = 0; n <= kLanes; ++n) {
        below[a][n] = 0;
        for (int l = 0; l < kLanes; ++l) below[a][n] |= std::uint32_t{place[a][l] < n} << l;
      }
    }
  }
};

// For every position of an interval, its own interval on the stream side.
struct AxisIntervals {
  Interval const* of = nullptr;
  int first = 0;
  NATTEN_INLINE Interval operator[](int position) const { return of[position - first]; }
};

// Lanes that share a weighted sum: the union of what they take part in.
struct LaneGroup {
  Interval box[kMaxRank];
  bool empty = true;

  // Both, of which the other follows.
  NATTEN_INLINE LaneGroup with(LaneGroup const& other) const {
    if (empty || other.empty) return empty ? other : *this;
    LaneGroup both = *this;
    for (int a = 0; a < kMaxRank; ++a) both.box[a].end = other.box[a].end;
    return both;
  }
};

struct Chunk;

struct Tile {
  TileShape const* shape;
  Interval box[kMaxRank];               // its tokens; fewer than the shape at the end of an axis
  Interval stream[kMaxRank];            // union of their intervals
  Interval interval[kMaxRank][kLanes];  // by place in the box; empty behind its end
  UintVec begin[kMaxRank];              // the same as vectors, by lane
  UintVec size[kMaxRank];
  IntVec position[kMaxRank];            // of each lane's token
  std::uint32_t lanes = ~0u;            // bit set: there is a token
  LaneGroup pairs[kLanes / 2];          // of lanes side by side

  Tile(TileShape const& shape_, int const (&corner)[kMaxRank], Interval const (&block)[kMaxRank],
       AxisIntervals const (&intervals)[kMaxRank])
      : shape(&shape_) {
    for (int a = 0; a < kMaxRank; ++a) {
      box[a] = {corner[a], min(corner[a] + shape->size[a], block[a].end)};
      int const n = box[a].size();
      stream[a] = {intervals[a][box[a].begin].begin, intervals[a][box[a].end - 1].end};
      position[a] = shape->places[a] + corner[a];
      lanes &= shape->below[a][n];
      begin[a] = UintVec{};
      size[a] = UintVec{};
      for (int i = 0; i < shape->size[a]; ++i) {
        interval[a][i] = i < n ? intervals[a][corner[a] + i] : Interval{};
        IntVec const here = shape->places[a] == i;
        begin[a] = here ? broadcast(std::uint32_t(interval[a][i].begin)) : begin[a];
        size[a] = here ? broadcast(std::uint32_t(interval[a][i].size())) : size[a];
      }
    }
    find_pairs();
  }

  // Becomes the tile next to it on an axis where it is one token long.
  void move_on(int axis, AxisIntervals const& intervals) {
    int const p = ++box[axis].begin;
    ++box[axis].end;
    position[axis] += 1;
    stream[axis] = interval[axis][0] = intervals[p];
    begin[axis] = broadcast(std::uint32_t(intervals[p].begin));
    size[axis] = broadcast(std::uint32_t(intervals[p].size()));
    for (LaneGroup& pair : pairs) pair.box[axis] = intervals[p];
  }

  // The same tokens against `n` tokens that all of them attend to.
  Tile against_all(int n) const {
    Tile all = *this;
    Interval const everything[kMaxRank] = {{0, 1}, {0, 1}, {0, n}};
    for (int a = 0; a < kMaxRank; ++a) {
      all.stream[a] = everything[a];
      all.begin[a] = UintVec{};
      for (int i = 0; i < shape->size[a]; ++i) all.interval[a][i] = i < box[a].size() ? everything[a] : Interval{};
      all.size[a] = size[a] != 0u ? broadcast(std::uint32_t(everything[a].size())) : UintVec{};
    }
    all.find_pairs();
    return all;
  }

  NATTEN_INLINE bool has(int lane) const { return (lanes >> lane) & 1u; }
  NATTEN_INLINE bool is_full() const { return lanes == shape->below[2][kLanes]; }
  NATTEN_INLINE Interval lane_interval(int axis, int lane) const { return interval[axis][shape->place[axis][lane]]; }

  // Lanes, from the first to the last, whose tokens may take part in stream row (z, y).
  NATTEN_INLINE Interval lanes_of_row(int z, int y) const {
    Interval const in_z = places_with(0, z), in_y = places_with(1, y);
    if (in_z.empty() || in_y.empty()) return {};
    int const plane = shape->size[1] * shape->size[2];
    return {in_z.begin * plane + in_y.begin * shape->size[2], (in_z.end - 1) * plane + in_y.end * shape->size[2]};
  }

  // Per lane, the number of tokens of stream row (z, y) that it takes part in: its whole last axis or nothing.
  NATTEN_INLINE UintVec row_size(int z, int y) const {
    IntVec const in =
        (broadcast(std::uint32_t(z)) - begin[0] < size[0]) & (broadcast(std::uint32_t(y)) - begin[1] < size[1]);
    return size[2] & bit_cast<UintVec>(in);
  }
  // Of a row's token x, the place in each lane's interval; a lane takes part if it is below the row's size: one unsigned
  // comparison checks both ends.
  NATTEN_INLINE UintVec place(IntVec x) const { return bit_cast<UintVec>(x) - begin[2]; }
  // Whether all lanes take part in all slots of a chunk's rows.
  NATTEN_INLINE bool takes_all(Chunk const& chunk) const;
  // Whether one lane does.
  NATTEN_INLINE bool takes_part(int lane, int z, int y, int x) const {
    return lane_interval(0, lane).contains(z) && lane_interval(1, lane).contains(y) &&
           lane_interval(2, lane).contains(x);
  }

 private:
  // Two lanes side by side are a box of the tile, too.
  NATTEN_INLINE void find_pairs() {
    for (int l = 0; l < kLanes; l += 2) {
      LaneGroup& pair = pairs[l / 2];
      pair.empty = !has(l);
      for (int a = 0; a < kMaxRank; ++a) {
        Interval const last = lane_interval(a, has(l + 1) ? l + 1 : l);
        pair.box[a] = {lane_interval(a, l).begin, last.end};
      }
    }
  }

  // Places on an axis whose intervals contain a stream position: neighbours, as intervals are monotone.
  NATTEN_INLINE Interval places_with(int axis, int position) const {
    int begin = 0;
    while (begin < shape->size[axis] && !interval[axis][begin].contains(position)) ++begin;
    int end = begin;
    while (end < shape->size[axis] && interval[axis][end].contains(position)) ++end;
    return {begin, end};
  }
};

// Some rows of the stream side, of the same tokens [x, x + width) each, and how a tile's scores of them are laid out:
// [row][slot][lane], where slot i of a lane is token x + begin + from[lane] + i. In a tile whose lanes share every token, those are
// all 0, and slots the tokens of the row. Else zeros follow the slots of a row, and come before those of the first.
struct Chunk {
  int x = 0;
  int width = 0;
  int slots = 0;
  int pitch = 0;  // vectors from row to row
  int begin = 0;  // of the first lane's slots; the others' are `from` behind it
  IntVec from = {};
  int rows = 0;
  int z[kMaxChunkTokens];
  int y[kMaxChunkTokens];
  int token[kMaxChunkTokens];  // packed index of the row's first token

  int tokens() const { return rows * width; }
  NATTEN_INLINE IntVec first() const { return from + begin; }
  // Tokens of the slots of some lanes, from x on.
  NATTEN_INLINE Interval tokens_of(int first_lane, int last_lane) const {
    return Interval{begin + from[first_lane], begin + from[last_lane] + slots}.clipped_to({0, width});
  }
  void append(StreamBox const& box, int z_, int y_) {
    z[rows] = z_;
    y[rows] = y_;
    token[rows++] = box.token(z_, y_, x);
  }
};

NATTEN_INLINE bool Tile::takes_all(Chunk const& chunk) const {
  if (shape->size[0] * shape->size[1] > 1) return false;  // its rows differ
  UintVec const first = place(chunk.first() + chunk.x);
  return !any((first >= size[2]) | (first + (chunk.slots - 1) >= size[2]));
}

// Calls visit(chunk) until the tile's part of a packed box is covered.
template <class Visit>
void for_each_chunk(Tile const& tile, StreamBox const& box, int max_tokens, int tokens_per_word, Visit&& visit) {
  Interval part[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    part[a] = tile.stream[a].clipped_to(box.axis[a]);
    if (part[a].empty()) return;
  }
  // Whole words of the packed rows; what lies beyond the tile's part is masked, beyond the box zero.
  int const first = box.first;
  int const x_begin = first + (part[2].begin - first) / tokens_per_word * tokens_per_word;
  int const x_end = first + round_up(part[2].end - first, tokens_per_word);
  int width = x_end - x_begin;
  if (width > max_tokens) width = round_up(ceil_div(width, ceil_div(width, max_tokens)), 2 * kMaxRun);
  Chunk chunk;
  for (int x = x_begin; x < x_end; x += width) {
    chunk.x = x;
    chunk.width = chunk.slots = chunk.pitch = min(width, x_end - x);
    chunk.rows = 0;
    int const max_rows = max(1, max_tokens / chunk.width);
    for (int z = part[0].begin; z < part[0].end; ++z) {
      for (int y = part[1].begin; y < part[1].end; ++y) {
        chunk.append(box, z, y);
        if (chunk.rows == max_rows) {
          visit(chunk);
          chunk.rows = 0;
        }
      }
    }
    if (chunk.rows > 0) visit(chunk);
  }
}

// The tile's own tokens as lanes: out[word] holds that word of each lane's token; 0 in lanes without a token. `out` has
// room for whole vectors of words.
template <class Math>
void load_lanes(GroupView<typename Math::Storage const> const& from, Tile const& tile, int dim, Vec* out) {
  typename Math::Storage const* tokens[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    tokens[l] = tile.has(l) ? from.at(tile.position[0][l], tile.position[1][l], tile.position[2][l]) : nullptr;
  }
  transpose_tokens<Math>([&](int l) { return tokens[l]; }, tile.is_full(), dim,
                         [&](int w, Vec const(&rows)[kLanes]) {
#pragma GCC unroll 16
                           for (int i = 0; i < kLanes; ++i) out[w + i] = rows[i];
                         });
}

// The tile's own tokens as a sum operand, in the order of lanes. Returns whether an element is infinite or NaN.
template <class Math>
bool load_lane_rows(GroupView<typename Math::Storage const> const& from, Tile const& tile, int dim,
                    Operand const& out) {
  typename Math::Storage const zeros[kLanes] = {};
  NonfiniteSearch<Math> nonfinite;
  auto const row = [&](int l) {
    return l < kLanes && tile.has(l) ? from.at(tile.position[0][l], tile.position[1][l], tile.position[2][l]) : nullptr;
  };
  for (int l = 0; l < kLanes; l += Math::kPerWord) {
    auto const* const first = row(l);
    auto const* const second = row(l + Math::kPerWord - 1);
    for (int c = 0; c < dim; c += kLanes) {
      Vec const v = Math::interleave(first ? first + c : zeros, second ? second + c : zeros, min(dim - c, kLanes));
      nonfinite.look_at(c / kLanes, v);
      store_vec(reinterpret_cast<float*>(word_at(out, l / Math::kPerWord, c)), v);
    }
  }
  return nonfinite.found();
}

// out[channel] += weight * the row of one lane, of rows as load_lane_rows makes them. `weight`: the word that the lane is in.
template <class Math>
NATTEN_INLINE void add_lane(Operand const& rows, int lane, Word const* weight, int dim, float* out) {
  constexpr int kTokens = Math::kPerWord;
  for (int c = 0; c < dim; c += kLanes) {
    Vec const v = Math::keep_tokens(load_as<Vec>(word_at(rows, lane / kTokens, c)), lane % kTokens, lane % kTokens + 1);
    store_vec(out + c, Math::multiply_add(load_vec(out + c), v, weight));
  }
}

// Stores a row for each of the tile's tokens in `lanes`: row l of `from`, which are `from_stride` floats, times factor(l).
template <class T, class Factor>
void store_lanes(GroupView<T> const& to, Tile const& tile, std::uint32_t lanes, int dim, float const* from,
                 std::int64_t from_stride, Factor const& factor) {
  auto const& at = tile.position;
  auto const is_stored = [&](int lane) { return (lanes >> lane) & 1u; };
  for (int l = 0; l < kLanes; ++l) {
    int const ahead = l + kStoreAhead;
    if (ahead < kLanes && is_stored(ahead)) prefetch_store(to, at[0][ahead], at[1][ahead], at[2][ahead], dim);
    if (is_stored(l)) store_token(to, at[0][l], at[1][l], at[2][l], from + l * from_stride, factor(l), dim);
  }
}

// The same for all of them.
template <class T, class Factor>
void store_lanes(GroupView<T> const& to, Tile const& tile, int dim, float const* from, std::int64_t from_stride,
                 Factor const& factor) {
  store_lanes(to, tile, tile.lanes, dim, from, from_stride, factor);
}

// out[channel] += what one lane sums up, from the tokens only that it takes part in: 0 * inf must not reach lanes that do
// not attend.
template <class Math>
void accumulate_exact(Chunk const& chunk, Interval const (&box)[kMaxRank], PackedTensor<Math> const& stream,
                      Word const* weights, int weights_pitch, float* out) {
  constexpr int kTokens = Math::kPerWord;
  for (int r = 0; r < chunk.rows; ++r) {
    if (!box[0].contains(chunk.z[r]) || !box[1].contains(chunk.y[r])) continue;
    for (int x = 0; x < chunk.width; x += kTokens) {
      Interval const part = Interval{box[2].begin - chunk.x - x, box[2].end - chunk.x - x}.clipped_to({0, kTokens});
      if (part.empty()) continue;
      Word const* const weight = weights + (r * weights_pitch + x / kTokens) * kLanes;
      for (int c = 0; c < stream.dim; c += kLanes) {
        Vec const v = load_as<Vec>(word_at(stream.sum, (chunk.token[r] + x) / kTokens, c));
        store_vec(out + c, Math::multiply_add(load_vec(out + c), Math::keep_tokens(v, part.begin, part.end), weight));
      }
    }
  }
}

// out[lane][channel] += sum over the chunk of weights[token][lane] * value[token][channel]; the weights of lanes that do
// not take part in a token are 0. Destroys the weights. Rows of `out` are `out_stride` floats. `fetch` is given
// turns.
template <class Math>
void accumulate_chunk(Tile const& tile, Chunk const& chunk, PackedTensor<Math> const& stream, bool nonfinite,
                      Vec* weights, float* out, std::int64_t out_stride, FetchAhead& fetch) {
  constexpr int kTokens = Math::kPerWord;
  int const pitch = Math::weights_to_words(weights, chunk.rows, chunk.slots, chunk.pitch, (chunk.first() & 1) != 0);
  Word const* const words = reinterpret_cast<Word const*>(weights);
  int lane_word[kLanes];  // of each lane's weight for the first word of a row
  for (int l = 0; l < kLanes; ++l) lane_word[l] = l - (chunk.begin + chunk.from[l]) / kTokens * kLanes;
  if (nonfinite) {
    for (int l = 0; l < kLanes; ++l) {
      if (!tile.has(l)) continue;
      Interval const seen = {chunk.x + chunk.tokens_of(l, l).begin, chunk.x + chunk.tokens_of(l, l).end};
      accumulate_exact<Math>(
          chunk, {tile.lane_interval(0, l), tile.lane_interval(1, l), tile.lane_interval(2, l).clipped_to(seen)},
          stream, words + lane_word[l], pitch, out + l * out_stride);
    }
    return;
  }

  // The words of each row that a group of lanes takes part in.
  auto const words_of = [&](LaneGroup const& group, int first, int lanes) {
    if (group.empty) return Interval{};
    Interval const part = Interval{group.box[2].begin - chunk.x, group.box[2].end - chunk.x}.clipped_to(
        chunk.tokens_of(first, first + lanes - 1));
    return part.empty() ? Interval{} : Interval{part.begin / kTokens, ceil_div(part.end, kTokens)};
  };
  auto const size_of = [&](LaneGroup const& group, int first, int lanes) {
    return group.box[0].size() * group.box[1].size() * words_of(group, first, lanes).size();
  };
  // The rows of a group: often those of the group before it, as lanes side by side see the same rows.
  WeightedRow rows[kMaxChunkTokens];
  int num_rows = -1;
  Interval rows_z, rows_y;
  auto const find_rows = [&](LaneGroup const& group) {
    if (num_rows >= 0 && rows_z == group.box[0] && rows_y == group.box[1]) return;
    rows_z = group.box[0];
    rows_y = group.box[1];
    num_rows = 0;
    for (int r = 0; r < chunk.rows; ++r) {  // no branch, which would be mispredicted at every change
      rows[num_rows] = {stream.sum.data + std::int64_t{chunk.token[r] / kTokens} * stream.sum.pitch,
                        words + r * pitch * kLanes};
      num_rows += int(rows_z.contains(chunk.z[r])) & int(rows_y.contains(chunk.y[r]));
    }
  };
  auto const add = [&](LaneGroup const& group, int first, auto lanes_c) {
    Interval const part = words_of(group, first, decltype(lanes_c)::value);
    if (part.empty()) return;
    fetch.some();
    find_rows(group);
    accumulate_channels<Math, decltype(lanes_c)::value>(rows, num_rows, part, WeightsOfLanes{lane_word + first},
                                                        stream.sum, stream.dim, out + first * out_stride, out_stride);
  };

  // Two pairs do the work of a four in less arithmetic, but at 6 loads for 8 FMAs instead of 8 for 16.
  for (int l = 0; l < kLanes; l += kMaxGroupLanes) {
    LaneGroup const& first = tile.pairs[l / 2];
    if constexpr (kMaxGroupLanes == 4) {
      LaneGroup const& second = tile.pairs[l / 2 + 1];
      LaneGroup const four = first.with(second);
      if (100 * 2 * size_of(four, l, 4) <= kPairPenalty * (size_of(first, l, 2) + size_of(second, l + 2, 2))) {
        add(four, l, std::integral_constant<int, 4>{});
        continue;
      }
      add(second, l + 2, std::integral_constant<int, 2>{});
    }
    add(first, l, std::integral_constant<int, 2>{});
  }
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
