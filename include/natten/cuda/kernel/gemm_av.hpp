// SPDX-License-Identifier: MIT
// Sums of rows with attention weights that are in memory, as an implicit GEMM over tiles: of the keys of a query's window
// (kAv), and of the queries whose windows hold a key (kAvTransposed).
#pragma once

#include "natten/cuda/kernel/gemm_block.hpp"

namespace natten::cuda {

// kSide: of the tokens that a block owns, and sums for.
template <class Policy, Side kSide>
struct GemmAv {
  static constexpr int kThreads = Policy::kThreads;
  static constexpr int kMinBlocks = 1;

  using Block = GemmBlock<Policy, kSide, kThreads>;
  using Params = typename Block::Params;
  using State = typename Block::State;
  using Element = typename Policy::Element;
  using OwnTile = typename Policy::OwnTile;

  // The sums leave by way of the ring.
  static constexpr int kTileBytes = Block::kRingBytes < OwnTile::kBytes ? OwnTile::kBytes : Block::kRingBytes;
  static constexpr int kScoresBegin = kTileBytes;
  static constexpr int kStateBegin = kScoresBegin + score_bytes<Policy>();
  static constexpr int kSharedBytes = kStateBegin + int(sizeof(State));
  static_assert(kSharedBytes <= Policy::kMaxSharedBytes, "the tiles are too large");

  CUTE_DEVICE void operator()(Params const& params, char* shared) const {
    State& all = *reinterpret_cast<State*>(shared + kStateBegin);
    Block::for_each_tile(params, all, [&](State& state) { sum_up(params, state, shared); });
  }

 private:
  CUTE_DEVICE static void sum_up(Params const& params, State& state, char* shared) {
    int const thread = threadIdx.x;
    auto const coordinates = score_coordinates<Policy>(thread);
    auto sum = make_accumulator<typename Policy::MmaTransposed, Policy::kOwn, Policy::kHeadDim>();
    auto const load = [&](int tile, Cursor const& at) { Block::load(params, state, shared, tile, at); };
    stream_tiles<Policy>(state, load, [&](int tile, Cursor const& cursor, auto const& arrive) {
      auto scores = make_accumulator<typename Policy::Mma, Policy::kOwn, Policy::kStreamed>();
      auto scores_rows = make_tensor(scores.data(), Policy::rows_by_columns(scores.layout()));
      // Where streamed keys are, the weights may be on their way while their tile is.
      if constexpr (kSide == Side::kKey) arrive();
      Block::for_each_pair(params, state, coordinates, tile, cursor, [&](int r, int c, bool attended, Element* weight) {
        if (attended) scores_rows(r, c) = float(*weight);
      });
      if constexpr (kSide == Side::kQuery) arrive();
      multiply_scores<Policy>(sum, scores, Block::slot(shared, tile), shared + kScoresBegin, thread);
    });
    __syncthreads();  // the last tile has been multiplied
    store_accumulator<Policy>(sum, shared, Block::own_view(params, state), state.own, params.problem.head_dim,
                              params.own_vectors, thread);
  }
};

template <class Policy, Side kSide, class Launch>
void run_gemm_av_of(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Kernel = GemmAv<Policy, kSide>;
  auto const params = Kernel::Block::make_params(arguments, context);
  launch(Kernel{}, params, std::min(params.partition.items, context.max_blocks), Kernel::kSharedBytes);
}

template <class Policy, class Launch>
void run_gemm_av(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  run_gemm_av_of<Policy, Side::kQuery>(arguments, context, launch);
}
template <class Policy, class Launch>
void run_gemm_av_transposed(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  run_gemm_av_of<Policy, Side::kKey>(arguments, context, launch);
}

}  // namespace natten::cuda
