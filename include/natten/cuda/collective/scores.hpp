// SPDX-License-Identifier: MIT
// From accumulated dot products to logits: scale, bias, and the mask of tiles that not every row attends to.
#pragma once

#include "natten/cuda/collective/block.hpp"

namespace natten::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Maximum {
  CUTE_DEVICE float operator()(float a, float b) const { return a < b ? b : a; }
};
struct Sum {
  CUTE_DEVICE float operator()(float a, float b) const { return a + b; }
};

// Over the lanes of a row.
template <int kRowLanes, class Operation>
CUTE_DEVICE float reduce_row(float x, Operation operation) {
  CUTE_UNROLL
  for (int bit = 1; bit < 32; bit *= 2) {
    if (kRowLanes & bit) x = operation(x, __shfl_xor_sync(0xffffffffu, x, bit));
  }
  return x;
}

// What dot products s are multiplied with, before the mask and inside the exponential of base 2. exp(scale * s) is
// exp2(c * s), one multiply-add with the maximum; not so with a bias, and a c that is 0 or negative would make of a
// masked -infinity something else.
struct LogitScale {
  float before, inside;

  static LogitScale make(Problem const& problem) {
    float const c = float(problem.scale) * kLog2E;
    return problem.has_rpb || !(c > 0) ? LogitScale{c, 1.0f} : LogitScale{1.0f, c};
  }
};

// logits, in units of `scale` before and of log2 after where a bias is given; -infinity where a row does not attend.
// `bias`: the head's table, or null.
template <class State, class Scores, class Coordinates>
CUTE_DEVICE void finish_scores(Scores& scores, Coordinates const& coordinates, State const& state, Walk const& walk,
                               int const (&origin)[kMaxRank], bool is_interior, float prescale, float const* bias,
                               int bias_tile) {
  if (prescale != 1.0f) {
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) *= prescale;
  }
  if (is_interior && bias == nullptr) return;
  int const first_column = get<1>(coordinates(0, 0));
  CUTE_UNROLL
  for (int r = 0; r < size<0>(scores); ++r) {
    int const row = get<0>(coordinates(r, 0));
    auto const columns = state.columns_of(row, walk, origin) >> first_column;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(scores); ++c) {
      int const column = get<1>(coordinates(r, c)) - first_column;
      bool const attended = (columns >> column) & 1;
      if (!attended) {
        scores(r, c) = -INFINITY;
      } else if (bias != nullptr) {
        scores(r, c) += kLog2E * bias[state.bias_row[row] + state.bias_column[first_column + column] + bias_tile];
      }
    }
  }
}

}  // namespace natten::cuda
