// SPDX-License-Identifier: MIT
// Attention weights between memory, where the slots of a query are a row (UnfusedArguments), and the vectors of a chunk,
// which hold the lanes of one streamed token each.
#pragma once

#include "natten/cpu/bias.hpp"
#include "natten/cpu/query_blocks.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// A chunk's weights by lane: those of lane l for the chunk's tokens are at l * kLanePitch. A row may be written beyond its
// end by less than a vector. An odd number of cache lines spreads the lanes over the sets of the L1 cache.
constexpr int kLanePitch = 17 * 16;
static_assert(kLanePitch >= kMaxChunkTokens + kLanes, "room for a chunk and a vector");

// by_lane[lane][token] = by_token[token][lane]
inline void tokens_to_lanes(Vec const* by_token, int tokens, float* by_lane) {
  for (int t = 0; t < tokens; t += kLanes) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = by_token[t + i];
    transpose(block);
    for (int l = 0; l < kLanes; ++l) store_vec(by_lane + l * kLanePitch + t, block[l]);
  }
}

// by_token[token][lane] = by_lane[lane][token]
inline void lanes_to_tokens(float const* by_lane, int tokens, Vec* by_token) {
  for (int t = 0; t < tokens; t += kLanes) {
    Vec block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = load_vec(by_lane + l * kLanePitch + t);
    transpose(block);
    for (int i = 0; i < kLanes; ++i) by_token[t + i] = block[i];
  }
}

// The slots of a lane of a query tile in a row of a chunk, which are side by side: visit(lane, row, x, slot), with the
// positions of their keys on the last axis, and the slot of the first. Where a lane has none, x is empty.
template <class Visit>
void for_each_run(Problem const& problem, Tile const& tile, Chunk const& chunk, Visit const& visit) {
  std::int64_t const line = problem.axes[2].kernel_size;
  std::int64_t const plane = problem.axes[1].kernel_size * line;
  for (int l = 0; l < kLanes; ++l) {
    Interval const z = tile.lane_interval(0, l), y = tile.lane_interval(1, l), x = tile.lane_interval(2, l);
    Interval const run = x.clipped_to({chunk.x, chunk.x + chunk.width});
    for (int r = 0; r < chunk.rows; ++r) {
      bool const is_attended = z.contains(chunk.z[r]) && y.contains(chunk.y[r]);
      std::int64_t const slot = (chunk.z[r] - z.begin) * plane + (chunk.y[r] - y.begin) * line + (run.begin - x.begin);
      visit(l, r, is_attended ? run : Interval{run.begin, run.begin}, slot);
    }
  }
}

// to[i] = from[i] + bias[i], i < n; of `from`, whole vectors may be read.
template <class Storage>
NATTEN_INLINE void store_run(Storage* to, float const* from, float const* bias, int n) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    store_vec(to + c, bias ? load_vec(from + c) + load_vec(bias + c) : load_vec(from + c));
  }
  if (c == n) return;
  Vec const last = load_vec(from + c);
  store_first(to + c, bias ? last + load_first(bias + c, n - c) : last, n - c);
}

// to[i] = from[i] for i in `part`, and 0 for the others, i < n; of `to`, whole vectors are written.
template <class Storage>
NATTEN_INLINE void load_run(float* to, Storage const* from, Interval part, int n) {
  for (int c = 0; c < n; c += kLanes) {
    bool const is_whole = part.contains(Interval{c, c + kLanes});
    store_vec(to + c, is_whole ? load_vec(from + c) : load_where(lanes_in(part.begin - c, part.end - c), from + c));
  }
}

// What the passes over query tiles know of the weights: the row of each lane.
template <class Storage>
class WeightRows {
 public:
  void point_to(Problem const& problem, TensorRef const& weights, TileContext const& c) {
    auto const view = query_view<Storage>(problem, weights, c.item.groups, c.item.batch, c.head);
    bool const is_on_row = c.next[0] == c.panel.box(0) && c.next[1] == c.panel.box(1);
    next_ = is_on_row ? (c.next[2].begin - c.panel.box(2).begin) * view.step[2] : 0;
    for (int l = 0; l < kLanes; ++l) {
      int const some = c.tile.has(l) ? l : 0;  // lanes without a token read nothing, but do arithmetic on a pointer
      rows_[l] = view.at(c.tile.position[0][some], c.tile.position[1][some], c.tile.position[2][some]);
    }
  }
  NATTEN_INLINE Storage* operator[](int lane) const { return rows_[lane]; }
  // Asks for the same run of the next tile: no hardware prefetcher follows the rows of all lanes, and without, waiting for
  // weights took twice as long as adding up what they weight.
  NATTEN_INLINE void prefetch_next(int lane, std::int64_t slot, int n) const {
    if (next_ == 0) return;
    constexpr int kLine = kLineBytes / static_cast<int>(sizeof(Storage));
    for (int i = 0; i < n; i += kLine) __builtin_prefetch(rows_[lane] + next_ + slot + i);
  }

 private:
  Storage* rows_[kLanes] = {};
  std::int64_t next_ = 0;  // elements to the next tile's rows
};

// The forward pass that streams the same tokens as an unfused op: keys, no values, nothing additional.
inline ForwardArguments streaming_keys(UnfusedArguments const& a) {
  ForwardArguments f;
  f.problem = a.problem;
  f.problem.head_dim_value = 0;
  f.problem.additional_keys = 0;
  f.problem.has_rpb = a.rpb != nullptr;
  f.query = a.query;
  f.key = a.key;
  f.rpb = a.rpb;
  f.num_threads = a.num_threads;
  return f;
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
