// SPDX-License-Identifier: MIT
// Gradients of the tokens that a pass streams, summed while it walks: those of another pass over the other side, for less.
#pragma once

#include "natten/cpu/panel.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// A row of sums for every token of a box. Where the walk's stream lies in a ring of slices along the first axis, so may they.
struct TokenSums {
  float* data = nullptr;  // [slice][position on the other axes][row]
  Interval box[kMaxRank];
  int ring = 1;  // slices
  int row = 0;

  explicit operator bool() const { return data != nullptr; }
  std::int64_t slice_floats() const { return std::int64_t{box[1].size()} * box[2].size() * row; }
  std::int64_t floats() const { return ring * slice_floats(); }
  NATTEN_INLINE float* at(int z, int y, int x) const {
    std::int64_t const line = std::int64_t{(z - box[0].begin) % ring} * box[1].size() + (y - box[1].begin);
    return data + (line * box[2].size() + (x - box[2].begin)) * row;
  }

  void clear(Interval slices) const {
    for (int z = slices.begin; z < slices.end; ++z) {
      std::memset(at(z, box[1].begin, box[2].begin), 0, sizeof(float) * slice_floats());
    }
  }

  // Stores those of `tokens`, which are in the ring.
  template <class T>
  void store(GroupView<T> const& to, Interval const (&tokens)[kMaxRank], int dim, float factor) const {
    for (int z = tokens[0].begin; z < tokens[0].end; ++z) {
      for (int y = tokens[1].begin; y < tokens[1].end; ++y) {
        for (int x = tokens[2].begin; x < tokens[2].end; ++x) {
          if (x + kStoreAhead < tokens[2].end) prefetch_store(to, z, y, x + kStoreAhead, dim);
          store_token(to, z, y, x, at(z, y, x), factor, dim);
        }
      }
    }
  }
};

// Lets the slices in reach be `next`: those that leave are done, and stored; those that come are cleared. Both ends only grow, and
// there is nothing between two steps' slices, as windows of neighbours touch (stride <= kernel_size).
template <class Clear, class Store>
void move_reach(Interval& reach, Interval next, Clear const& clear, Store const& store) {
  store({reach.begin, next.begin});
  clear({reach.end, next.end});
  reach = next;
}

// Adds to the sums of a panel's keys, for each the sum over lanes of weights[key][lane] * rows[lane]. Tiles side by side on the
// last axis would share too few keys: no lines.
template <class Math>
class PanelSums {
 public:
  // `rows`: of the panel's tiles one after the other, each kLanes tokens of `dim` channels as sum operand. `nonfinite`: whether
  // one of them is.
  PanelSums(Panel const& panel, PanelChunk const& chunk, StreamBox const& box, Word* rows, int dim, bool nonfinite)
      : panel_(panel), chunk_(chunk), box_(box), rows_(rows), dim_(dim), nonfinite_(nonfinite) {}

  static std::int64_t row_words(int dim) { return operand_words(dim) * (kLanes / Math::kPerWord); }
  static Operand rows_of(Word* rows, int tile, int dim) {
    return Operand(rows + tile * row_words(dim), dim, kLanes / Math::kPerWord);
  }
  // Vectors of scratch memory.
  static constexpr int kScratch = Math::kPerWord > 1 ? 2 * kPanelTiles * kScoreVectors : 0;

  // Weights as slide_rows lays them out. `fetch` is given turns.
  void add(Vec const* weights, Vec* scratch, TokenSums const& sums, FetchAhead& fetch) const {
    Group groups[kMaxGroups];
    int const num_groups = find_groups(groups);
    Chunk const& like = chunk_.of_tile[0];  // all see the same tokens of a row
    int lane_word[kWords];
    for (int w = 0; w < kWords; ++w) lane_word[w] = w - like.from[w * kTokens] * kLanes;
    Word const* next[kPanelTiles];  // weights of the next row
    int pitch = 0;
    for (int t = 0; t < panel_.count(); ++t) {
      next[t] =
          Math::slots_by_lane(weights + t * kScoreVectors + kMaxPadding, chunk_.of_tile[t].rows, like.slots, like.pitch,
                              like.from, kMaxGroupLanes, scratch + t * (kScratch / kPanelTiles), pitch);
    }
    for (int r = 0; r < chunk_.rows; ++r) {
      PanelChunk::Row const& row = chunk_.row[r];
      float* const out = sums.at(row.z, row.y, like.x + like.begin);
      if (nonfinite_) {
        for (int t = row.first; t < row.end; ++t) add_exactly(t, row, next[t], lane_word, out, sums.row);
      } else {
        for (int g = 0; g < num_groups; ++g) {
          Group const& group = groups[g];
          fetch.some();
          // Sums are read and written once a group, in no order that hardware foresees: without, 3-D takes 9 % longer.
          if (g + 1 < num_groups) prefetch_token(out + groups[g + 1].place * sums.row, groups[g + 1].size * sums.row);
          WeightedRow of_tile[kPanelTiles];
          for (int t = row.first; t < row.end; ++t) {
            of_tile[t - row.first] = {rows_of(rows_, t, dim_).data, next[t] + group.place * kLanes};
          }
          auto const run = [&](auto size) {
            accumulate_channels<Math, decltype(size)::value>(of_tile, row.end - row.first, group.words,
                                                             WeightsOfTokens{lane_word}, rows_of(rows_, 0, dim_), dim_,
                                                             out + group.place * sums.row, sums.row);
          };
          if (group.size == kMaxGroupLanes) run(std::integral_constant<int, kMaxGroupLanes>{});
          else if (group.size == 2) run(std::integral_constant<int, 2>{});
          else run(std::integral_constant<int, 1>{});
        }
      }
      for (int t = row.first; t < row.end; ++t) next[t] += pitch * kLanes;
    }
  }

 private:
  static constexpr int kTokens = Math::kPerWord;
  static constexpr int kWords = kLanes / kTokens;

  // Tokens side by side, and the words of lanes that take part in any of them.
  struct Group {
    int place;  // of the first, from the first that a tile sees
    int size;
    Interval words;
  };
  static constexpr int kMaxGroups = (kMaxSlidingSlots + kLanes) / kMaxGroupLanes + 2;

  int find_groups(Group* groups) const {
    Chunk const& c = chunk_.of_tile[0];
    int const words = ceil_div(panel_[0].box[2].size(), kTokens);
    int const tokens = min(c.from[kLanes - 1] + c.slots, box_.axis[2].end - (c.x + c.begin));
    int count = 0;
    Interval taking;  // both ends only grow
    for (int place = 0, size; place < tokens; place += size) {
      int const left = tokens - place;
      size = left >= kMaxGroupLanes ? kMaxGroupLanes : left >= 2 ? 2 : 1;
      while (taking.begin < words && c.from[(taking.begin + 1) * kTokens - 1] + c.slots <= place) ++taking.begin;
      while (taking.end < words && c.from[taking.end * kTokens] < place + size) ++taking.end;
      if (!taking.empty()) groups[count++] = {place, size, taking};
    }
    return count;
  }

  // Without multiplying lanes that do not attend: 0 * inf must not reach a key.
  void add_exactly(int t, PanelChunk::Row const& row, Word const* weights, int const* lane_word, float* out,
                   int out_stride) const {
    Chunk const& c = chunk_.of_tile[t];
    int const first = c.x + c.begin;
    for (int l = 0; l < kLanes; ++l) {
      if (!panel_[t].has(l)) continue;
      for (int place = c.from[l]; place < c.from[l] + c.slots; ++place) {
        if (!panel_[t].takes_part(l, row.z, row.y, first + place)) continue;
        add_lane<Math>(rows_of(rows_, t, dim_), l, weights + place * kLanes + lane_word[l / kTokens], dim_,
                       out + place * out_stride);
      }
    }
  }

  Panel const& panel_;
  PanelChunk const& chunk_;
  StreamBox const& box_;
  Word* rows_;
  int dim_;
  bool nonfinite_;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
