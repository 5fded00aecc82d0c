// SPDX-License-Identifier: MIT
// The definition of a window: which keys a query attends to on one axis of the grid. Everything else in the project
// (tile boxes, masks, skipping, backward, FLOP counts, pictures) is derived from `Group::window` and from the fact
// that both of its ends are non-decreasing in the query's position.
#pragma once

#include <cstdint>

// Force-inlined: a copy emitted by a file compiled for a newer ISA could be the one the linker keeps for everybody.
#if defined(__CUDACC__)
#define NATTEN_INLINE __host__ __device__ __forceinline__
#else
#define NATTEN_INLINE inline __attribute__((always_inline))
#endif

namespace natten {

NATTEN_INLINE constexpr int min(int a, int b) { return a < b ? a : b; }
NATTEN_INLINE constexpr int max(int a, int b) { return a < b ? b : a; }
NATTEN_INLINE constexpr int clamp(int x, int low, int high) { return max(low, min(x, high)); }
NATTEN_INLINE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }  // a >= 0, b > 0

// Rounds towards minus infinity, also for negative a (an offset larger than a position). b > 0.
NATTEN_INLINE constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

struct Interval {
  int begin = 0;
  int end = 0;

  NATTEN_INLINE constexpr int size() const { return end - begin; }
  NATTEN_INLINE constexpr bool empty() const { return end <= begin; }
  NATTEN_INLINE constexpr bool contains(int i) const { return begin <= i && i < end; }
  NATTEN_INLINE constexpr bool operator==(Interval other) const { return begin == other.begin && end == other.end; }
  NATTEN_INLINE constexpr bool contains(Interval other) const { return begin <= other.begin && other.end <= end; }
  // Never inverted, and non-decreasing in both ends of `*this`: clipping keeps windows monotone.
  NATTEN_INLINE constexpr Interval clipped_to(Interval box) const {
    return {clamp(begin, box.begin, box.end), clamp(end, box.begin, box.end)};
  }
};

enum class Boundary : int {
  kShift = 0,  // the window moves inwards: every token sees kernel_size keys (neighborhood attention)
  kMask = 1,   // the window is clipped: border tokens see fewer keys (HaloNet, Swin)
  kZeros = 2,  // as kMask, and every missing key counts as a key with logit 0 and value 0 (SASA)
  kValid = 3,  // only tokens with a whole window are queries
};

// One dilation group of an axis: tokens with the same remainder modulo the dilation. All numbers are positions in the
// group, position p being token p * dilation + index.
struct Group {
  int index = 0;
  int dilation = 1;
  int length = 1;  // of the whole grid's group, of which the tensors may hold only a box
  int kernel_size = 1;
  int stride = 1;
  int offset = 0;
  bool is_causal = false;
  Boundary boundary = Boundary::kShift;
  Interval queries;  // positions the query tensor holds
  Interval keys;     // positions the key tensor holds

  // The window before any border is looked at; for "zeros", its size counts the missing keys too.
  NATTEN_INLINE constexpr Interval unclipped(int p) const {
    int leader = p;
    if (stride != 1 || offset != 0) {
      leader = floor_div(p - offset, stride) * stride + offset + (is_causal ? stride - 1 : stride / 2);
    }
    if (boundary == Boundary::kShift) leader = min(leader, length - 1);
    if (is_causal) return {leader - kernel_size + 1, p + 1};
    int begin = leader - kernel_size / 2;
    return {begin, begin + kernel_size};
  }

  // The window in the whole grid.
  NATTEN_INLINE constexpr Interval grid_window(int p) const {
    Interval w = unclipped(p);
    if (boundary == Boundary::kShift && !is_causal) {
      int begin = clamp(w.begin, 0, length - kernel_size);
      return {begin, begin + kernel_size};
    }
    return w.clipped_to({0, length});
  }

  // The keys in the tensor that query p attends to.
  NATTEN_INLINE constexpr Interval window(int p) const { return grid_window(p).clipped_to(keys); }

  // How many keys of this axis the softmax of query p counts: for "zeros", the missing ones too.
  NATTEN_INLINE constexpr int counted(int p) const {
    return boundary == Boundary::kZeros ? unclipped(p).size() : window(p).size();
  }

  // The first query in the tensor whose window has `end` beyond j (`begin` beyond j): binary search, as both ends
  // are monotone.
  NATTEN_INLINE constexpr int first_ending_after(int j) const {
    int low = queries.begin, high = queries.end;
    while (low < high) {
      int middle = low + (high - low) / 2;
      if (window(middle).end > j) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  NATTEN_INLINE constexpr int first_beginning_after(int j) const {
    int low = queries.begin, high = queries.end;
    while (low < high) {
      int middle = low + (high - low) / 2;
      if (window(middle).begin > j) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // The inverse window: the queries in the tensor that attend to key j. An interval again.
  NATTEN_INLINE constexpr Interval inverse(int j) const {
    int begin = first_ending_after(j);
    return {begin, max(begin, first_beginning_after(j))};
  }

  // Boxes: the union of the windows of a non-empty run of queries, the keys that all of them see (maybe none); and the
  // same of the inverse windows of a run of keys.
  NATTEN_INLINE constexpr Interval keys_of(Interval tile) const {
    return {window(tile.begin).begin, window(tile.end - 1).end};
  }
  NATTEN_INLINE constexpr Interval interior_keys_of(Interval tile) const {
    int begin = window(tile.end - 1).begin;
    return {begin, max(begin, window(tile.begin).end)};
  }
  NATTEN_INLINE constexpr Interval queries_of(Interval tile) const {
    int begin = first_ending_after(tile.begin);
    return {begin, max(begin, first_beginning_after(tile.end - 1))};
  }
  NATTEN_INLINE constexpr Interval interior_queries_of(Interval tile) const {
    int begin = first_ending_after(tile.end - 1);
    return {begin, max(begin, first_beginning_after(tile.begin))};
  }

  // Whether the key tensor holds every window of the queries that are there.
  NATTEN_INLINE constexpr bool keys_suffice() const {
    if (queries.empty()) return true;
    return keys.begin <= grid_window(queries.begin).begin && grid_window(queries.end - 1).end <= keys.end;
  }
};

// Keys that a query with boundary "zeros" misses, of the numbers that it counts and has on every axis. A sum of products, as
// the difference of two may be small beside them; and they may be beyond 64 bits.
template <int kRank>
NATTEN_INLINE constexpr double missing_keys(int const (&counted)[kRank], int const (&present)[kRank]) {
  double missing = 0, all = 1;  // on the axes so far
  for (int a = 0; a < kRank; ++a) {
    missing = missing * present[a] + all * (counted[a] - present[a]);
    all *= counted[a];
  }
  return missing;
}

struct Axis {
  int extent = 1;  // of the whole grid, in tokens
  int kernel_size = 1;
  int stride = 1;
  int dilation = 1;
  bool is_causal = false;
  Boundary boundary = Boundary::kShift;
  int offset = 0;
  int query_origin = 0;  // token of the grid that is the query tensor's first
  int query_extent = 1;
  int key_origin = 0;
  int key_extent = 1;

  NATTEN_INLINE constexpr int groups() const { return min(dilation, extent); }

  NATTEN_INLINE constexpr Group group(int g) const {
    Group r;
    r.index = g;
    r.dilation = dilation;
    r.length = ceil_div(extent - g, dilation);
    r.kernel_size = kernel_size;
    r.stride = stride;
    r.offset = offset;
    r.is_causal = is_causal;
    r.boundary = boundary;
    r.queries = positions(g, query_origin, query_extent);
    r.keys = positions(g, key_origin, key_extent);
    return r;
  }

  // The tokens of the query tensor that are queries: all of them, but for "valid" only those with a whole window.
  NATTEN_INLINE constexpr Interval valid_queries() const {
    Interval box{query_origin, query_origin + query_extent};
    if (boundary != Boundary::kValid) return box;
    int left = kernel_size / 2;
    Interval whole{left * dilation, max(left * dilation, extent - (kernel_size - 1 - left) * dilation)};
    return whole.clipped_to(box);
  }

 private:
  // Positions of the group's tokens in [origin, origin + size).
  NATTEN_INLINE constexpr Interval positions(int g, int origin, int size) const {
    int begin = floor_div(origin - g + dilation - 1, dilation);
    return {begin, max(begin, floor_div(origin + size - g + dilation - 1, dilation))};
  }
};

}  // namespace natten
