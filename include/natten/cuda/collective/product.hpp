// SPDX-License-Identifier: MIT
// What the fused kernels do with accumulators: multiply them by the streamed tile, and write them out.
#pragma once

#include "natten/cuda/collective/block.hpp"
#include "natten/cuda/collective/multiply.hpp"

namespace natten::cuda {

// A thread's place among those that share the scores: every column group computes them for itself.
template <class Policy>
CUTE_DEVICE int score_thread(int thread) {
  return thread % Policy::kScoreThreads;
}

// Shared memory for scores that cannot stay in registers: of each column group.
template <class Policy>
constexpr int score_bytes() {
  return Policy::kOperandInRegisters ? 0 : Policy::kColumnGroups * Policy::ScoreTile::kBytes;
}

// accumulator (kOwn, kStreamed) += own (kOwn, kHeadDim) streamed (kStreamed, kHeadDim)^T.
template <class Policy, class Accumulator>
CUTE_DEVICE void multiply_tokens(Accumulator& accumulator, char* own, char* streamed, int thread) {
  multiply<typename Policy::Mma, typename Policy::CopyOwn, typename Policy::CopyStreamed>(
      accumulator, Policy::OwnTile::tensor(own), Policy::StreamedTile::tensor(streamed), score_thread<Policy>(thread));
}

// (row, column) of each element of a score accumulator, as a tensor (rows, columns).
template <class Policy>
CUTE_DEVICE auto score_coordinates(int thread) {
  auto const all = make_identity_tensor(Shape<Int<Policy::kOwn>, Int<Policy::kStreamed>>{});
  auto const mine = typename Policy::Mma{}.get_thread_slice(score_thread<Policy>(thread)).partition_C(all);
  return make_tensor(mine.data(), Policy::rows_by_columns(mine.layout()));
}

// The order of the streamed tile's rows in a product: as they come, unless the policy permutes them.
template <class Policy>
CUTE_DEVICE auto streamed_rows() {
  if constexpr (is_void_v<typename Policy::RowOrder>) {
    return Layout<Int<Policy::kStreamed>>{};
  } else {
    return typename Policy::RowOrder{};
  }
}

// accumulator (kOwn, kHeadDim) += scores (kOwn, kStreamed) streamed (kStreamed, kHeadDim). Scores that cannot be an
// operand in registers pass through `shared_scores`, where a warp reads only what it wrote.
template <class Policy, class Accumulator, class Scores>
CUTE_DEVICE void multiply_scores(Accumulator& accumulator, Scores const& scores, char* streamed, char* shared_scores,
                                 int thread) {
  using Mma = typename Policy::MmaTransposed;
  auto const transposed = Policy::StreamedTile::transposed(streamed, streamed_rows<Policy>());
  if constexpr (Policy::kOperandInRegisters) {
    using Operand = typename Mma::ValTypeA;
    auto rounded = make_tensor<Operand>(scores.layout());
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) rounded(i) = Operand(scores(i));
    auto const operand = make_tensor(rounded.data(), Policy::as_operand(rounded.layout()));
    multiply_fragment<Mma, typename Policy::CopyTransposed>(accumulator, operand, transposed, thread);
  } else {
    using Element = typename Policy::Element;
    auto tile = Policy::ScoreTile::tensor(shared_scores + thread / Policy::kScoreThreads * Policy::ScoreTile::kBytes);
    auto mine = typename Policy::Mma{}.get_thread_slice(score_thread<Policy>(thread)).partition_C(tile);
    __syncwarp();  // the last product has read its scores
    CUTE_UNROLL
    for (int i = 0; i < size(scores); ++i) mine(i) = Element(scores(i));
    __syncwarp();
    multiply<Mma, typename Policy::CopyScores, typename Policy::CopyTransposed>(accumulator, tile, transposed, thread);
  }
}

// Writes an accumulator (kOwn, kHeadDim) to the tokens of the own tile, by way of a shared tile that no thread reads any
// more.
template <class Policy, class Accumulator>
CUTE_DEVICE void store_accumulator(Accumulator const& accumulator, char* shared, TokenView const& view, Own const& own,
                                   int head_dim, bool vectors, int thread) {
  using Element = typename Policy::Element;
  auto tile = Policy::OwnTile::tensor(shared);
  auto mine = typename Policy::MmaTransposed{}.get_thread_slice(thread).partition_C(tile);
  CUTE_UNROLL
  for (int i = 0; i < size(accumulator); ++i) mine(i) = Element(accumulator(i));
  __syncthreads();
  store_tile<typename Policy::OwnTile, Policy::kThreads, Element, Policy::kOwn, Policy::kHeadDim>(
      shared, view, own.tokens, own.origin, head_dim, vectors, thread);
}

}  // namespace natten::cuda
