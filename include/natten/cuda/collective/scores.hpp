// SPDX-License-Identifier: MIT
// From accumulated dot products to logits: scale, bias, and the mask of tiles that not every row attends to.
#pragma once

#include "natten/cuda/collective/block.hpp"
#include "natten/cuda/collective/warp.hpp"

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

// What dot products are multiplied with: `before` the mask, and from then on, to logits of base e or 2. A softmax multiplies
// the difference from the maximum, which is exact for the maximum itself, whatever its magnitude. Not so with a bias, and a
// factor that is 0 or negative would make of a masked -infinity something else.
struct LogitScale {
  float before, to_natural, to_base2;

  static LogitScale make(Problem const& problem) {
    float const scale = float(problem.scale);
    bool const at_once = problem.has_rpb || !(scale > 0);
    float const rest = at_once ? 1.0f : scale;
    return {at_once ? scale : 1.0f, rest, rest * kLog2E};
  }

  // Rounded as the logits of any other kernel are, so that LSE and the backward pass agree on the maximum of a row.
  CUTE_DEVICE float natural(float score) const { return rounded_product(score, to_natural); }
};

// Scores, which LogitScale makes logits of; -infinity where a row does not attend. `bias`: the head's table, or null.
template <class State, class Scores, class Coordinates>
CUTE_DEVICE void finish_scores(Scores& scores, Coordinates const& coordinates, State const& state, Walk const& walk,
                               int const (&origin)[kMaxRank], bool is_interior, float prescale, float const* bias,
                               int bias_tile) {
  if (prescale != 1.0f) {
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) = rounded_product(scores(i), prescale);
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
        scores(r, c) += bias[state.bias_row[row] + state.bias_column[first_column + column] + bias_tile];
      }
    }
  }
}

}  // namespace natten::cuda
