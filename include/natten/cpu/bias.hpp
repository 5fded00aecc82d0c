// SPDX-License-Identifier: MIT
// The relative positional bias of one head for the lanes of a tile: reading it, and gathering its gradient.
#pragma once

#include "natten/cpu/schedule.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Where the gradient of a head's bias is added to, and the lanes that it is of.
struct BiasGradient {
  float* table = nullptr;  // null for none
  std::uint32_t lanes = 0;
};

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

  // Per lane, the entry for its streamed token (z, y, x); any entry in lanes that do not take part in it.
  NATTEN_INLINE IntVec index(int z, int y, IntVec x, IntVec keep) const {
    return (lanes_ + (center_ + z * step_[0] + y * step_[1]) + x * step_[2]) & keep;
  }
  NATTEN_INLINE Vec at(int z, int y, IntVec x, IntVec keep) const {
    IntVec const i = index(z, y, x, keep);
    Vec v;
    for (int l = 0; l < kLanes; ++l) v[l] = table_[i[l]];
    return v;
  }
  // The entries of one lane for the streamed tokens from (z, y, x) on along the last axis.
  NATTEN_INLINE float const* run(int lane, int z, int y, int x) const {
    return table_ + (lanes_[lane] + center_ + z * step_[0] + y * step_[1] + x * step_[2]);
  }
  // Adds the gradient of the logits; that of lanes which do not take part is 0. No two other lanes share an entry.
  NATTEN_INLINE void scatter(int z, int y, IntVec x, IntVec keep, Vec gradient, BiasGradient const& to) const {
    IntVec const i = index(z, y, x, keep);
    for (int l = 0; l < kLanes; ++l) to.table[i[l]] += (to.lanes >> l) & 1u ? gradient[l] : 0.0f;
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

// Runs run(unit, head_kv, d_bias) for all units of work of all key heads, d_bias being where to add the gradient of the bias
// ([heads][table]; null if none is wanted). That gradient is a sum over everything a head does: it is split into a fixed
// number of parts, each summed in order by one thread, and the parts are added in order. The same result every time,
// without atomics.
template <class Arguments, class Run>
void for_each_unit(Arguments const& arguments, std::int64_t units_per_head, Run const& run) {
  Problem const& problem = arguments.problem;
  if (arguments.d_rpb == nullptr) {
    for_each_item(units_per_head * problem.heads_kv, arguments.num_threads, [&](std::int64_t i) {
      run(i % units_per_head, static_cast<int>(i / units_per_head), static_cast<float*>(nullptr));
    });
    return;
  }
  std::int64_t const parts = units_per_head < 8 ? units_per_head : 8;
  std::int64_t const size = problem.heads * Bias::table_size(problem);
  ZeroedFloats const partial(parts * size);
  for_each_item(parts * problem.heads_kv, arguments.num_threads, [&](std::int64_t i) {
    std::int64_t const part = i % parts;
    for (std::int64_t unit = part; unit < units_per_head; unit += parts) {
      run(unit, static_cast<int>(i / parts), partial.data() + part * size);
    }
  });
  float* const d_rpb = static_cast<float*>(arguments.d_rpb);
  for (std::int64_t i = 0; i < size; ++i) {
    float total = 0;
    for (std::int64_t part = 0; part < parts; ++part) total += partial.data()[part * size + i];
    d_rpb[i] = total;
  }
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
