// SPDX-License-Identifier: MIT
// How a problem is cut into work items for threads. An item is a block: a box of tiles of one dilation group of one head.
// It is walked along the first axis, a slice of tiles at a time, and the part of the stream that a slice needs moves along
// in a ring: every token is packed once an item. Where a slice's stream is too large (windows of thousands of tokens), the
// whole block takes it in pieces, and tiles keep their state from piece to piece.
#pragma once

#include "natten/cpu/panel.hpp"
#include "natten/cpu/work.hpp"
#include "natten/tiling.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Grids of rank 2 arrive with an axis of extent 1 in front. The walk along the first axis wants it to be a real one; the
// layout of the bias table does not notice, as long as the kernel size is 1 too.
template <class... Tensors>
void put_walk_axis_first(Problem& problem, Tensors&... tensors) {
  Axis const& first = problem.axes[0];
  if (first.extent > 1 || first.kernel_size > 1 || problem.axes[1].extent == 1) return;
  auto const swap = [](auto& a, auto& b) {
    auto const t = a;
    a = b;
    b = t;
  };
  swap(problem.axes[0], problem.axes[1]);
  for (auto& shapes : problem.tiles.shape) {
    for (auto& shape : shapes) swap(shape[0], shape[1]);
  }
  (swap(tensors.stride_axis[0], tensors.stride_axis[1]), ...);
}

// Bounds of one thread's scratch memory. With scores and intervals it stays below 8 MB, whatever the window.
constexpr std::int64_t kPackedBytes = 4 << 20;
constexpr std::int64_t kStateBytes = 1 << 20;
constexpr int kMaxWordPadding = 2;  // tokens that fill the words at the ends of a row
constexpr int kItemsPerThread = 4;  // enough for threads to finish together, if their shares are not equal
// Of sums per streamed token (token_sums.hpp): they, and what is packed, are most of a thread's memory.
constexpr std::int64_t kSumBytes = (5 << 20) / 2;
// What blocks may be widened by altogether (Schedule::widened): two products of seven are saved for it.
constexpr double kMaxWidening = 1.25;
constexpr int kTileTableIndex = kLanes == 16 ? 2 : kLanes == 8 ? 1 : 0;
static_assert(TileTable::kSmallest << kTileTableIndex == kLanes, "the table holds a tile for every vector width");

// Equal shares for all threads, or enough items for shares to be nearly equal.
inline bool keeps_busy(int num_threads, std::int64_t items) {
  int const threads = max(1, num_threads);
  return items % threads == 0 || items >= std::int64_t{kItemsPerThread} * threads;
}

inline Side other_side(Side side) { return side == Side::kQuery ? Side::kKey : Side::kQuery; }

// The side whose tokens are lanes, cut into blocks.
struct Schedule {
  Side side;
  bool slides;
  TileShape tile;
  int panel_axis = 0;  // on which the tiles of a panel are neighbours
  int panel[kMaxRank];  // tokens
  int groups[kMaxRank];
  int block[kMaxRank];  // tokens; whole tiles, unless blocks are widened
  int widest[kMaxRank];  // tokens of a block with what it is widened by
  int blocks[kMaxRank];  // per group
  int step;  // tokens of a block on the first axis that are worked on at a time
  std::int64_t max_packed;  // tokens, with what rows are padded by
  std::int64_t max_summed = std::int64_t{1} << 62;  // tokens, without
  std::int64_t batch;
  int heads_kv;
  std::int64_t items;
  bool completes_stream;
  bool has_ring = false;  // whether what a step streams fits into the ring

  // `token_bytes`: of a packed token of the stream. `state_bytes`: of a token of a tile, between pieces. `allow_ring`:
  // whether a tile can be finished with what the ring holds. `may_slide`: whether tiles may be those of a panel, if there is a ring.
  // `sum_bytes`: of what is summed up for a token of the stream; if there are sums, an item completes those of its share.
  Schedule(Problem const& problem, Side side_, std::int64_t token_bytes, std::int64_t state_bytes, bool allow_ring,
           bool may_slide, int num_threads, std::int64_t sum_bytes = 0)
      : side(side_),
        slides(may_slide && kCanSlide && problem.tiles.queries_slide && allow_ring),
        max_packed(max(64, static_cast<int>(kPackedBytes / token_bytes))),
        batch(problem.batch),
        heads_kv(problem.heads_kv),
        completes_stream(sum_bytes > 0) {
    if (completes_stream) max_summed = kSumBytes / sum_bytes;
    if (slides && plan(problem, state_bytes, allow_ring, num_threads)) return;
    slides = false;
    plan(problem, state_bytes, allow_ring, num_threads);
  }

 private:
  // Returns whether what a step streams fits into the ring.
  bool plan(Problem const& problem, std::int64_t state_bytes, bool allow_ring, int num_threads) {
    if (slides) {
      tile = TileShape();
      // Where windows are longest, neighbours share most; on the last axis only those of windows longer than a tile.
      int const longer = problem.axes[1].kernel_size >= problem.axes[0].kernel_size ? 1 : 0;
      panel_axis = has_lines(problem) ? 2 : longer;
    } else {
      tile = TileShape(problem.tiles.shape[static_cast<int>(side)][kTileTableIndex]);
    }
    Group first[kMaxRank];
    int whole[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      groups[a] = problem.axes[a].groups();
      first[a] = problem.axes[a].group(0);
      panel[a] = tile.size[a] * (slides && a == panel_axis ? kPanelTiles : 1);
      whole[a] = round_up(longest(problem.axes[a]), panel[a]);
      block[a] = max(whole[a], panel[a]);
    }
    // The ring of a slice has to fit: cut across the walk where that helps.
    auto const fits = [&] {
      std::int64_t const rows = std::int64_t{longest_stream(first[0], panel[0], /*is_wide=*/false)} *
                                longest_stream(first[1], block[1], completes_stream);
      int const row = longest_stream(first[2], block[2], completes_stream);
      return rows * (row + kMaxWordPadding) <= max_packed && rows * row <= max_summed;
    };
    while (!fits() && halve(block[1] > block[2] ? 1 : 2)) {
    }
    // With what it is widened by, a block has whole tiles.
    for (int a = 1; a < kMaxRank && completes_stream; ++a) {
      int const before = block[a], more = longest_widened(first[a], before) - before;
      block[a] = round_up(before + more, panel[a]) - more;
      if (!fits()) block[a] = before;
    }
    has_ring = allow_ring && fits() && tokens(block) >= min(kMinBlock, tokens(whole));
    if (!has_ring) {
      if (slides) return false;
      for (int a = 0; a < kMaxRank; ++a) block[a] = max(whole[a], panel[a]);
      while (tokens(block) * state_bytes > kStateBytes && halve(largest())) {
      }
    }
    auto const count_items = [&] {
      items = batch * heads_kv;
      for (int a = 0; a < kMaxRank; ++a) {
        blocks[a] = ceil_div(whole[a], block[a]);
        items *= std::int64_t{groups[a]} * blocks[a];
      }
    };
    count_items();
    // Every cut packs a window's length twice.
    while (items > 0 && !keeps_busy(num_threads, items) && tokens(block) > kMinBlock &&
           halve(block[0] > panel[0] ? 0 : largest())) {
      count_items();
    }
    step = has_ring ? panel[0] : block[0];
    for (int a = 0; a < kMaxRank; ++a) {
      widest[a] = block[a];
      for (int g = 0; g < groups[a] && completes_stream; ++g) {
        widest[a] = max(widest[a], longest_widened(problem.axes[a].group(g), block[a]));
      }
    }
    return has_ring;
  }

 public:
  // The tokens of the stream that are a block's: it is cut where the blocks are.
  Interval share_of_stream(Group const& group, Interval of_block) const {
    Interval const all = tile_side(group, side), stream = tile_side(group, other_side(side));
    return Interval{of_block.begin == all.begin ? stream.begin : of_block.begin,
                    of_block.end == all.end ? stream.end : of_block.end}
        .clipped_to(stream);
  }

  // A block, and between it and its neighbours' other tokens those that attend to its share of the stream. Sums for that
  // share are complete then, and no other block need be waited for: what two blocks have in common is computed twice.
  Interval widened(Group const& group, Interval of_block) const {
    Interval const share = share_of_stream(group, of_block);
    if (!completes_stream || of_block.empty() || share.empty()) return of_block;
    Interval const attending = stream_of(group, other_side(side), share);
    if (attending.empty()) return of_block;
    return {natten::min(of_block.begin, attending.begin), max(of_block.end, attending.end)};
  }

  // Whether every token of the stream side is in the stream of the block whose share it is of, and blocks are not widened
  // by too much.
  bool can_complete_stream(Problem const& problem) const {
    double widening = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      double uncut = 0, cut = 0;  // lanes: what is widened may have tiles that are not full
      for (int g = 0; g < groups[a]; ++g) {
        Group const group = problem.axes[a].group(g);
        bool is_streamed = true;
        for_each_block(group, block[a], [&](Interval of_block) {
          Interval const wide = widened(group, of_block), share = share_of_stream(group, of_block);
          is_streamed = is_streamed && (share.empty() || stream_of(group, side, wide).contains(share));
          cut += round_up(wide.size(), panel[a]);
        });
        uncut += round_up(tile_side(group, side).size(), panel[a]);
        if (!is_streamed || tile_side(group, side).empty()) return false;
      }
      widening *= cut / uncut;
    }
    return widening <= kMaxWidening;
  }

  struct Item {
    std::int64_t batch;
    int head_kv;
    Group groups[kMaxRank];
    Interval block[kMaxRank];  // positions on the tile side; may be empty
    Interval own[kMaxRank];  // those of them that are no other item's: what it stores
    Interval share[kMaxRank];  // the same of the stream side, if it completes sums
    bool empty;

    // The lanes of a tile that are the item's own.
    std::uint32_t own_lanes(Tile const& tile) const {
      std::uint32_t lanes = tile.lanes;
      for (int a = 0; a < kMaxRank; ++a) {
        if (own[a] == block[a]) continue;
        for (int l = 0; l < kLanes; ++l) {
          if (!own[a].contains(tile.position[a][l])) lanes &= ~(1u << l);
        }
      }
      return lanes;
    }
  };

  Item item(Problem const& problem, std::int64_t index) const {
    int g[kMaxRank], b[kMaxRank];
    for (int a = kMaxRank - 1; a >= 0; --a) {
      b[a] = static_cast<int>(index % blocks[a]);
      index /= blocks[a];
    }
    for (int a = kMaxRank - 1; a >= 0; --a) {
      g[a] = static_cast<int>(index % groups[a]);
      index /= groups[a];
    }
    Item item;
    item.head_kv = static_cast<int>(index % heads_kv);
    item.batch = index / heads_kv;
    item.empty = false;
    for (int a = 0; a < kMaxRank; ++a) {
      item.groups[a] = problem.axes[a].group(g[a]);
      Interval const tokens = tile_side(item.groups[a], side);
      int const begin = tokens.begin + b[a] * block[a];
      item.own[a] = {natten::min(begin, tokens.end), natten::min(begin + block[a], tokens.end)};
      item.block[a] = widened(item.groups[a], item.own[a]);
      item.share[a] = share_of_stream(item.groups[a], item.own[a]);
      item.empty = item.empty || item.own[a].empty();
    }
    return item;
  }

  // Items are ordered by batch entry, head, dilation group and block.
  std::int64_t blocks_per_group() const { return std::int64_t{blocks[0]} * blocks[1] * blocks[2]; }
  std::int64_t groups_per_head() const { return std::int64_t{groups[0]} * groups[1] * groups[2]; }

  // Room for the intervals of a block's positions.
  int positions() const { return widest[0] + widest[1] + widest[2]; }
  int panels_per_step() const {
    return ceil_div(step, panel[0]) * ceil_div(widest[1], panel[1]) * ceil_div(widest[2], panel[2]);
  }
  // Tiles whose states are kept side by side.
  int tiles_per_panel() const { return slides ? kPanelTiles : 1; }

  // The tokens of the panel behind the one at `corner` of a step's block.
  void next_panel(int const (&corner)[kMaxRank], Interval const (&step_block)[kMaxRank],
                  Interval const (&item_block)[kMaxRank], Interval (&next)[kMaxRank]) const {
    bool carry = true;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      Interval const all = a == 0 ? item_block[0] : step_block[a];
      int begin = corner[a] + (carry ? panel[a] : 0);
      carry = carry && begin >= all.end;
      if (carry) begin = all.begin;
      next[a] = {begin, natten::min(begin + panel[a], all.end)};
    }
    if (carry) next[0] = {};
  }

  Panel panel_at(int const (&corner)[kMaxRank], Interval const (&of_block)[kMaxRank],
                 AxisIntervals const (&intervals)[kMaxRank]) const {
    Panel tiles;
    tiles.add(tile, corner, of_block, intervals);
    if constexpr (kPanelTiles > 1) {
      int at[kMaxRank] = {corner[0], corner[1], corner[2]};
      while (tiles.count() < tiles_per_panel() &&
             (at[panel_axis] += tile.size[panel_axis]) < of_block[panel_axis].end) {
        if (panel_axis == 2) tiles.add(tile, at, of_block, intervals);
        else tiles.add(tiles[tiles.count() - 1]).move_on(panel_axis, intervals[panel_axis]);
      }
    }
    return tiles;
  }

 private:
  // A smaller block packs its stream too often for too few tiles.
  static constexpr std::int64_t kMinBlock = 256;

  static std::int64_t tokens(int const (&box)[kMaxRank]) { return std::int64_t{box[0]} * box[1] * box[2]; }
  static std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  bool halve(int axis) {
    if (block[axis] <= panel[axis]) return false;
    block[axis] = ceil_div(block[axis] / panel[axis], 2) * panel[axis];
    return true;
  }
  int largest() const { return block[0] >= block[1] ? (block[0] >= block[2] ? 0 : 2) : (block[1] >= block[2] ? 1 : 2); }
  int longest(Axis const& axis) const {
    int n = 0;
    for (int g = 0; g < axis.groups(); ++g) n = max(n, tile_side(axis.group(g), side).size());
    return n;
  }
  template <class Visit>
  void for_each_block(Group const& group, int size, Visit const& visit) const {
    Interval const all = tile_side(group, side);
    for (int p = all.begin; p < all.end; p += size) visit(Interval{p, natten::min(p + size, all.end)});
  }
  int longest_widened(Group const& group, int size) const {
    int longest = 0;
    for_each_block(group, size, [&](Interval of_block) { longest = max(longest, widened(group, of_block).size()); });
    return longest;
  }
  // `is_wide`: of widened blocks.
  int longest_stream(Group const& group, int size, bool is_wide) const {
    int longest = 1;
    for_each_block(group, size, [&](Interval of_block) {
      Interval const tiles = is_wide ? widened(group, of_block) : of_block;
      longest = max(longest, stream_of(group, side, tiles).size());
    });
    return longest;
  }
};

// The intervals of a block's positions, written to `memory`.
inline void fill_intervals(Schedule::Item const& item, Side side, Interval* memory, AxisIntervals (&out)[kMaxRank]) {
  for (int a = 0; a < kMaxRank; ++a) {
    out[a] = {memory, item.block[a].begin};
    if (side == Side::kQuery) fill_windows(item.groups[a], item.block[a], memory);
    else fill_inverse_windows(item.groups[a], item.block[a], memory);
    memory += item.block[a].size();
  }
}

// Calls visit(corner, index) for every panel of a block.
template <class Visit>
void for_each_panel(Interval const (&block)[kMaxRank], int const (&size)[kMaxRank], Visit const& visit) {
  int index = 0;
  for (int z = block[0].begin; z < block[0].end; z += size[0]) {
    for (int y = block[1].begin; y < block[1].end; y += size[1]) {
      for (int x = block[2].begin; x < block[2].end; x += size[2], ++index) {
        int const corner[kMaxRank] = {z, y, x};
        visit(corner, index);
      }
    }
  }
}

// Cuts a box into pieces of at most max_tokens, rows whole where they fit, and calls visit(piece).
template <class Visit>
void for_each_piece(Interval const (&box)[kMaxRank], std::int64_t max_tokens, int tokens_per_word, Visit const& visit) {
  int const limit = static_cast<int>(max_tokens) / tokens_per_word * tokens_per_word;
  int const nx = max(1, min(box[2].size(), limit));
  int const ny = max(1, min(box[1].size(), limit / round_up(nx, tokens_per_word)));
  int const nz = max(1, min(box[0].size(), limit / round_up(nx, tokens_per_word) / ny));
  for (int z = box[0].begin; z < box[0].end; z += nz) {
    for (int y = box[1].begin; y < box[1].end; y += ny) {
      for (int x = box[2].begin; x < box[2].end; x += nx) {
        Interval const piece[kMaxRank] = {
            {z, min(z + nz, box[0].end)}, {y, min(y + ny, box[1].end)}, {x, min(x + nx, box[2].end)}};
        visit(StreamBox(piece, tokens_per_word, /*padding=*/0, z, piece[0].size()));
      }
    }
  }
}

// The walk of an item: its steps, and for each the pieces of its stream. A step with one piece has it in the ring.
class Walk {
 public:
  Walk(Schedule const& schedule, Schedule::Item const& item, int tokens_per_word)
      : schedule_(schedule), item_(item), tokens_per_word_(tokens_per_word) {
    for (int a = 0; a < kMaxRank; ++a) stream_[a] = stream_of(item.groups[a], schedule.side, item.block[a]);
    for_each_step([&](Interval const(&block)[kMaxRank]) { ring_ = max(ring_, slices_of(block).size()); });
    // Words begin where windows in the middle of the axis do: else most windows would stick out by a token at both ends.
    int const middle = item.block[2].begin + item.block[2].size() / schedule.tile.size[2] / 2 * schedule.tile.size[2];
    int const begin = stream_of(item.groups[2], schedule.side, {middle, middle + 1}).begin;
    padding_ = (tokens_per_word - (begin - stream_[2].begin) % tokens_per_word) % tokens_per_word;
    std::int64_t const slice =
        std::int64_t{stream_[1].size()} * round_up(stream_[2].size() + padding_, tokens_per_word);
    is_ring_ = slice * ring_ <= schedule.max_packed;
    capacity_ = is_ring_ ? slice * ring_ : schedule.max_packed;
  }

  bool is_ring() const { return is_ring_; }
  // The longest stream of a step, in slices along the first axis.
  int ring() const { return ring_; }
  // All its rows, and the tokens of one.
  int ring_rows() const { return ring_ * stream_[1].size(); }
  int row_tokens() const { return stream_[2].size(); }
  // The stream of a step along the first axis.
  Interval slices_of(Interval const (&block)[kMaxRank]) const {
    return stream_of(item_.groups[0], schedule_.side, block[0]);
  }
  // Tokens that have to be packed at a time.
  std::int64_t capacity() const { return capacity_; }

  template <class Visit>
  void for_each_step(Visit const& visit) const {
    for (int z = item_.block[0].begin; z < item_.block[0].end; z += schedule_.step) {
      Interval const block[kMaxRank] = {
          {z, min(z + schedule_.step, item_.block[0].end)}, item_.block[1], item_.block[2]};
      visit(block);
    }
  }

  // visit(box, slices): `slices` of the box are to be packed before it is used, the others are there if `keeps_ring`.
  template <class Visit>
  void for_each_stream_piece(Interval const (&block)[kMaxRank], bool keeps_ring, Visit const& visit) const {
    Interval const box[kMaxRank] = {slices_of(block), stream_[1], stream_[2]};
    if (box[0].empty() || box[1].empty() || box[2].empty()) return;
    if (!is_ring_) {
      for_each_piece(box, capacity_, tokens_per_word_, [&](StreamBox const& piece) { visit(piece, piece.axis[0]); });
      return;
    }
    // What the step before this one has packed.
    int const before = block[0].begin - schedule_.step;
    int packed_end = box[0].begin;
    if (keeps_ring && before >= item_.block[0].begin) {
      packed_end = max(packed_end, stream_of(item_.groups[0], schedule_.side, {before, block[0].begin}).end);
    }
    visit(StreamBox(box, tokens_per_word_, padding_, stream_[0].begin, ring_),
          Interval{packed_end, max(packed_end, box[0].end)});
  }

 private:
  Schedule const& schedule_;
  Schedule::Item const& item_;
  int tokens_per_word_;
  Interval stream_[kMaxRank];
  int padding_ = 0;
  int ring_ = 1;
  bool is_ring_ = false;
  std::int64_t capacity_ = 0;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
