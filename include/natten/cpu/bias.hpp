// SPDX-License-Identifier: MIT
// The relative positional bias of one head for the lanes of a tile: reading it, and gathering its gradient.
#pragma once

#include "natten/cpu/tile.hpp"
#include "natten/tiling.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Entry key position - query position + kernel_size - 1 per axis. Flattened, the index is linear in both positions, so
// that a lane's part and the streamed token's part are computed apart and added.
class Bias {
 public:
  Bias() = default;
  Bias(Problem const& problem, void const* table, int head, Tile const& tile, Side side) {
    if (!problem.has_rpb) return;
    std::int64_t const size = table_size(problem);
    table_ = static_cast<float const*>(table) + head * size;
    int step = 1;
    std::int32_t const sign = side == Side::kQuery ? 1 : -1;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      int const kernel_size = problem.axes[a].kernel_size;
      center_ += (kernel_size - 1) * step;
      step_[a] = sign * step;
      lanes_ -= tile.position[a] * (sign * step);
      step *= 2 * kernel_size - 1;
    }
  }

  explicit operator bool() const { return table_ != nullptr; }

  // Per lane, the entry for the streamed token (z, y, x); any entry in lanes that do not take part in it.
  NATTEN_INLINE IntVec index(int z, int y, int x, IntVec keep) const {
    return (lanes_ + (center_ + z * step_[0] + y * step_[1] + x * step_[2])) & keep;
  }
  NATTEN_INLINE Vec at(int z, int y, int x, IntVec keep) const {
    IntVec const i = index(z, y, x, keep);
    Vec v;
    for (int l = 0; l < kLanes; ++l) v[l] = table_[i[l]];
    return v;
  }
  // Adds the gradient of the logits; that of lanes which do not take part is 0. No two other lanes share an entry.
  NATTEN_INLINE void scatter(int z, int y, int x, IntVec keep, Vec gradient, float* to) const {
    IntVec const i = index(z, y, x, keep);
    for (int l = 0; l < kLanes; ++l) to[i[l]] += gradient[l];
  }

  static std::int64_t table_size(Problem const& problem) {
    std::int64_t size = 1;
    for (Axis const& axis : problem.axes) size *= 2 * axis.kernel_size - 1;
    return size;
  }

 private:
  float const* table_ = nullptr;
  int step_[kMaxRank] = {0, 0, 0};
  int center_ = 0;
  IntVec lanes_ = {};
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
