// SPDX-License-Identifier: MIT
// How a problem is cut into work items for threads. An item is a block: a box of tiles of one dilation group of one head.
// Its stream box is packed once, piece by piece if it is too large, and shared by its tiles.
#pragma once

#include <cstdlib>
#include <new>

#include "natten/cpu/parallel.hpp"
#include "natten/cpu/tile.hpp"
#include "natten/tiling.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Bounds of one thread's scratch memory: the packed stream, and the unfinished tiles of a block whose stream comes in
// pieces. Together with intervals and scores below 8 MB, whatever the window.
constexpr std::int64_t kPackedBytes = 4 << 20;
constexpr std::int64_t kStateBytes = 2 << 20;
constexpr int kTileTableIndex = kLanes == 16 ? 2 : kLanes == 8 ? 1 : 0;
static_assert(TileTable::kSmallest << kTileTableIndex == kLanes, "the table holds a tile for every vector width");
constexpr int kItemsPerThread = 4;  // enough for threads to finish together

// The side whose tokens are lanes, cut into blocks.
struct Schedule {
  Side side;
  TileShape tile;
  int groups[kMaxRank];
  int block[kMaxRank];   // tokens, whole tiles
  int blocks[kMaxRank];  // per group
  std::int64_t batch;
  int heads_kv;
  std::int64_t items;

  // `max_packed`: tokens of the stream that fit into kPackedBytes. `max_block`: tokens of a block that fit into
  // kStateBytes.
  Schedule(Problem const& problem, Side side_, std::int64_t max_packed, std::int64_t max_block, int num_threads)
      : side(side_),
        tile(problem.tiles.shape[static_cast<int>(side_)][kTileTableIndex]),
        batch(problem.batch),
        heads_kv(problem.heads_kv) {
    Group first[kMaxRank];
    int tiles[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      groups[a] = problem.axes[a].groups();
      first[a] = problem.axes[a].group(0);
      tiles[a] = longest(problem.axes[a], side) > 0 ? ceil_div(longest(problem.axes[a], side), tile.size[a]) : 0;
      block[a] = max(1, tiles[a]) * tile.size[a];
    }
    // Halve the block until it fits and there is work for all threads.
    for (;;) {
      std::int64_t packed = 1, tokens = 1;
      items = batch * heads_kv;
      for (int a = 0; a < kMaxRank; ++a) {
        blocks[a] = ceil_div(tiles[a] * tile.size[a], block[a]);
        packed *= longest_stream(first[a], block[a]);
        tokens *= block[a];
        items *= groups[a] * blocks[a];
      }
      bool const too_large = tokens > max_block || (packed > max_packed && tokens > kMinBlock);
      bool const too_few = num_threads > 1 && items < std::int64_t{kItemsPerThread} * num_threads && tokens > kMinBlock;
      if (items == 0 || !(too_large || too_few)) break;
      int axis = -1;
      for (int a = 0; a < kMaxRank; ++a) {
        if (block[a] > tile.size[a] && (axis < 0 || block[a] > block[axis])) axis = a;
      }
      if (axis < 0) break;
      block[axis] = ceil_div(block[axis] / tile.size[axis], 2) * tile.size[axis];
    }
  }

  struct Item {
    std::int64_t batch;
    int head_kv;
    Group groups[kMaxRank];
    Interval block[kMaxRank];  // positions on the tile side; may be empty
    bool empty;
  };

  Item item(Problem const& problem, std::int64_t index) const {
    Item item;
    item.empty = false;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      int const b = static_cast<int>(index % blocks[a]);
      index /= blocks[a];
      item.groups[a] = problem.axes[a].group(static_cast<int>(index % groups[a]));
      index /= groups[a];
      Interval const tokens = tile_side(item.groups[a], side);
      int const begin = tokens.begin + b * block[a];
      item.block[a] = {min(begin, tokens.end), min(begin + block[a], tokens.end)};
      item.empty = item.empty || item.block[a].empty();
    }
    item.head_kv = static_cast<int>(index % heads_kv);
    item.batch = index / heads_kv;
    return item;
  }

  // Room for the intervals of a block's positions.
  int positions() const { return block[0] + block[1] + block[2]; }
  int tiles_per_block() const {
    return block[0] / tile.size[0] * (block[1] / tile.size[1]) * (block[2] / tile.size[2]);
  }

 private:
  // A smaller block packs its stream too often for too few tiles.
  static constexpr int kMinBlock = 512;

  static int longest(Axis const& axis, Side side) {
    int n = 0;
    for (int g = 0; g < axis.groups(); ++g) n = max(n, tile_side(axis.group(g), side).size());
    return n;
  }
  std::int64_t longest_stream(Group const& group, int block_size) const {
    Interval const tokens = tile_side(group, side);
    int longest = 1;
    for (int p = tokens.begin; p < tokens.end; p += block_size) {
      longest = max(longest, stream_of(group, side, {p, min(p + block_size, tokens.end)}).size());
    }
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

// Calls visit(corner, index) for every tile of the block.
template <class Visit>
void for_each_tile(Schedule::Item const& item, TileShape const& tile, Visit&& visit) {
  int index = 0;
  for (int z = item.block[0].begin; z < item.block[0].end; z += tile.size[0]) {
    for (int y = item.block[1].begin; y < item.block[1].end; y += tile.size[1]) {
      for (int x = item.block[2].begin; x < item.block[2].end; x += tile.size[2], ++index) {
        int const corner[kMaxRank] = {z, y, x};
        visit(corner, index);
      }
    }
  }
}

// Cuts a box into pieces of at most max_tokens, rows whole where they fit, and calls visit(piece).
template <class Visit>
void for_each_piece(Interval const (&box)[kMaxRank], std::int64_t max_tokens, int tokens_per_word, Visit&& visit) {
  int const limit = static_cast<int>(max_tokens) / tokens_per_word * tokens_per_word;
  int const nx = max(1, min(box[2].size(), limit));
  int const ny = max(1, min(box[1].size(), limit / round_up(nx, tokens_per_word)));
  int const nz = max(1, min(box[0].size(), limit / round_up(nx, tokens_per_word) / ny));
  for (int z = box[0].begin; z < box[0].end; z += nz) {
    for (int y = box[1].begin; y < box[1].end; y += ny) {
      for (int x = box[2].begin; x < box[2].end; x += nx) {
        visit(StreamBox({z, min(z + nz, box[0].end)}, {y, min(y + ny, box[1].end)}, {x, min(x + nx, box[2].end)},
                        tokens_per_word));
      }
    }
  }
}

// Runs body(index) for every index below `count`, on threads that take the next index when they are done with one.
template <class Body>
void for_each_item(std::int64_t count, int num_threads, Body const& body) {
  struct Context {
    std::int64_t next;
    std::int64_t count;
    Body const* body;
  } context{0, count, &body};
  int const threads = static_cast<int>(count < num_threads ? count : num_threads);
  if (threads <= 0) return;
  parallel_region(
      threads,
      [](void* pointer, int) {
        Context& c = *static_cast<Context*>(pointer);
        for (;;) {
          std::int64_t const i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
          if (i >= c.count) return;
          (*c.body)(i);
        }
      },
      &context);
}

// Zeroed memory that outlives an item. No standard container: its code would be compiled for this ISA and could be
// linked for all.
class ZeroedFloats {
 public:
  explicit ZeroedFloats(std::int64_t count)
      : data_(static_cast<float*>(std::calloc(static_cast<std::size_t>(count), sizeof(float)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~ZeroedFloats() { std::free(data_); }
  ZeroedFloats(ZeroedFloats const&) = delete;
  ZeroedFloats& operator=(ZeroedFloats const&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

// Cuts one piece of memory into aligned arrays; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* const result = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
  std::int64_t used() const { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
