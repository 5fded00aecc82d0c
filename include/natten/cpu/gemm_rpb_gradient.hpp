// SPDX-License-Identifier: MIT
// The gradient of the bias table, from unfused weights: a row of a query's window is added to a row of the table. As long
// as it takes to read the weights.
#pragma once

#include "natten/cpu/weights.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Queries summed in registers, where their windows move with them; their weights stay in the L1 cache meanwhile, and those
// of as many more are on their way.
constexpr int kQueriesAtOnce = 16;

// table[i] += sum over rows of row[i], i < n; of `table`, whole vectors may be read and written.
template <class Storage>
NATTEN_INLINE void add_rows(float* table, Storage const* row, std::int64_t step, int rows, int n) {
  std::int64_t const ahead = kQueriesAtOnce * step;
  for (int c = 0; c < n; c += kLanes) {
    Vec sum = load_vec(table + c);
    Storage const* from = row + c;
    if (c + kLanes <= n) {
      for (int r = 0; r < rows; ++r, from += step) {
        __builtin_prefetch(from + ahead);
        sum += load_vec(from);
      }
    } else {
      IntVec const lanes = first_lanes(n - c);
      for (int r = 0; r < rows; ++r, from += step) {
        __builtin_prefetch(from + ahead);
        sum += load_where(lanes, from);
      }
    }
    store_vec(table + c, sum);
  }
}

template <class Storage>
class RpbGradient {
 public:
  explicit RpbGradient(UnfusedArguments const& arguments)
      : arguments_(arguments),
        problem_(arguments.problem),
        schedule_(problem_, Side::kQuery, /*token_bytes=*/1, /*state_bytes=*/0, /*allow_ring=*/true,
                  /*may_slide=*/false, kCuts) {}

  void run() const {
    std::int64_t const items_per_head = schedule_.blocks_per_group() * schedule_.groups_per_head();  // and batch entry
    for_each_unit(arguments_, problem_.batch * items_per_head, [&](std::int64_t unit, int head, float* d_rpb) {
      std::int64_t const first = (unit / items_per_head * problem_.heads_kv + head) * items_per_head;
      Schedule::Item const item = schedule_.item(problem_, first + unit % items_per_head);
      if (!item.empty) run_item(item, head, d_rpb + head * Bias::table_size(problem_));
    });
  }

 private:
  // Items do not depend on the number of threads, nor does the order of the sums.
  static constexpr int kCuts = 8;

  void run_item(Schedule::Item const& item, int head, float* d_rpb) const {
    std::int64_t const size = Bias::table_size(problem_);
    Arena counter(nullptr);
    counter.take<Interval>(schedule_.positions());
    counter.take<float>(size + kLanes);
    Arena arena(thread_workspace(counter.used()));
    AxisIntervals windows[kMaxRank];
    fill_intervals(item, Side::kQuery, arena.take<Interval>(schedule_.positions()), windows);
    float* const table = arena.take<float>(size + kLanes);
    std::memset(table, 0, sizeof(float) * (size + kLanes));

    auto const weights = query_view<Storage const>(problem_, arguments_.weights, item.groups, item.batch, head);
    Axis const(&axes)[kMaxRank] = problem_.axes;
    std::int64_t const line = 2 * axes[2].kernel_size - 1;
    std::int64_t const plane = (2 * axes[1].kernel_size - 1) * line;
    auto const entry = [&](int axis, int query) {
      return windows[axis][query].begin - query + axes[axis].kernel_size - 1;
    };
    for (int z = item.block[0].begin; z < item.block[0].end; ++z) {
      for (int y = item.block[1].begin; y < item.block[1].end; ++y) {
        float* const plane_of_query = table + entry(0, z) * plane + entry(1, y) * line;
        for (int x = item.block[2].begin, next; x < item.block[2].end; x = next) {
          int const end = min(x + kQueriesAtOnce, item.block[2].end);
          auto const is_alike = [&](int other) {
            return entry(2, other) == entry(2, x) && windows[2][other].size() == windows[2][x].size();
          };
          for (next = x + 1; next < end && is_alike(next);) ++next;
          float* const first = plane_of_query + entry(2, x);
          Storage const* const row = weights.at(z, y, x);
          for (int i = 0; i < windows[0][z].size(); ++i) {
            for (int j = 0; j < windows[1][y].size(); ++j) {
              std::int64_t const slot = (std::int64_t{i} * axes[1].kernel_size + j) * axes[2].kernel_size;
              add_rows(first + i * plane + j * line, row + slot, weights.step[2], next - x, windows[2][x].size());
            }
          }
        }
      }
    }
    for (std::int64_t i = 0; i < size; ++i) d_rpb[i] += table[i];
  }

  UnfusedArguments const& arguments_;
  Problem const& problem_;
  Schedule schedule_;
};

template <class Storage>
void gemm_rpb_gradient(UnfusedArguments const& original) {
  UnfusedArguments arguments = original;
  arguments.problem.heads_kv = arguments.problem.heads;  // there are no keys
  put_walk_axis_first(arguments.problem, arguments.weights);
  RpbGradient<Storage>(arguments).run();
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
