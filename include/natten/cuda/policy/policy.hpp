// SPDX-License-Identifier: MIT
// An architecture is a policy: how tiles come into shared memory (collective/copy.hpp), which atoms multiply them, and
// how an accumulator's elements are spread over rows and columns. What every policy states:
//
//   Element, kHeadDim, kOwn, kStreamed, kStages       sizes of tiles; rows in the kernel table
//   kScoreThreads, kThreads                           that share the rows; and times kColumnGroups
//   Mma, MmaTransposed                                a (M, K) times b (N, K), and times b stored as (K, N)
//   CopyOwn, CopyStreamed, CopyTransposed             shared memory to registers
//   kOperandInRegisters                               an accumulator can be an operand where it is, by as_operand
//   RowOrder                                          order of the streamed rows in that operand; void: as they come
//   kRowLanes                                         bits of the lane that do not change an accumulator's rows
//   rows_by_columns, transposed_rows_by_columns       accumulator layouts of Mma, MmaTransposed as (rows, columns)
//   copy, commit, wait                                as in collective/copy.hpp
//   kMaxSharedBytes                                   of a block, on every GPU that runs the policy
#pragma once

#include "natten/cuda/collective/tile.hpp"

namespace natten::cuda {

// Threads that share a row's scores hold 1 / kColumnGroups of the columns of its output: 16 rows of 256 columns would be
// half of a warp's registers. Every group computes the scores for itself.
constexpr int column_groups(int head_dim, int columns = 128) { return head_dim <= columns ? 1 : 2; }

template <class Element_, int kHeadDim_, int kOwn_, int kStreamed_, int kStages_>
struct PolicySizes {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kOwn = kOwn_;
  static constexpr int kStreamed = kStreamed_;
  static constexpr int kStages = kStages_;
  using OwnTile = SharedTile<Element, kOwn, kHeadDim>;
  using StreamedTile = SharedTile<Element, kStreamed, kHeadDim>;
  using ScoreTile = SharedTile<Element, kOwn, kStreamed>;
};

}  // namespace natten::cuda
