// SPDX-License-Identifier: MIT
// Dot products of queries and the keys of their windows, as an implicit GEMM over tiles: products that nobody attends to
// are not stored.
#pragma once

#include "natten/cuda/kernel/gemm_block.hpp"

namespace natten::cuda {

template <class Policy>
struct GemmQk {
  // Groups of threads that share the columns of an output have no output here.
  static constexpr int kThreads = Policy::kScoreThreads;
  static constexpr int kMinBlocks = 1;

  using Block = GemmBlock<Policy, Side::kQuery, kThreads>;
  using Params = typename Block::Params;
  using State = typename Block::State;
  using Element = typename Policy::Element;
  using OwnTile = typename Policy::OwnTile;

  static constexpr int kRingBegin = OwnTile::kBytes;
  static constexpr int kStateBegin = kRingBegin + Block::kRingBytes;
  static constexpr int kSharedBytes = kStateBegin + int(sizeof(State));
  static_assert(kSharedBytes <= Policy::kMaxSharedBytes, "the tiles are too large");

  CUTE_DEVICE void operator()(Params const& params, char* shared) const {
    State& all = *reinterpret_cast<State*>(shared + kStateBegin);
    Block::for_each_tile(params, all, [&](State& state) {
      multiply_all(params, state, shared);
      clear_all(params, state);
    });
  }

 private:
  CUTE_DEVICE static void multiply_all(Params const& params, State& state, char* shared) {
    int const thread = threadIdx.x;
    Own const& own = state.own;
    char* const ring = shared + kRingBegin;
    load_tile<OwnTile, Policy, kThreads, Element, Policy::kOwn, Policy::kHeadDim>(
        Block::own_view(params, state), own.tokens, own.origin, params.problem.head_dim, params.own_vectors, shared,
        thread);
    auto const coordinates = score_coordinates<Policy>(thread);
    float const* const bias =
        params.rpb == nullptr ? nullptr : params.rpb + std::int64_t{own.head} * params.bias.entries;
    auto const load = [&](int tile, Cursor const& at) { Block::load(params, state, ring, tile, at); };
    stream_tiles<Policy>(state, load, [&](int tile, Cursor const& cursor, auto const& arrive) {
      arrive();
      auto scores = make_accumulator<typename Policy::Mma, Policy::kOwn, Policy::kStreamed>();
      multiply_tokens<Policy>(scores, shared, Block::slot(ring, tile), thread);
      auto const scores_rows = make_tensor(scores.data(), Policy::rows_by_columns(scores.layout()));
      float const* const bias_tile = bias == nullptr ? nullptr : bias + params.bias.of_position(cursor.origin);
      Block::for_each_pair(params, state, coordinates, tile, cursor, [&](int r, int c, bool attended, Element* weight) {
        if (!attended) return;
        float score = scores_rows(r, c);
        if (bias != nullptr) {
          score += bias_tile[state.bias_row[get<0>(coordinates(r, 0))] + state.bias_column[get<1>(coordinates(r, c))]];
        }
        *weight = Element(score);
      });
    });
  }

  // A warp a query.
  CUTE_DEVICE static void clear_all(Params const& params, State const& state) {
    Own const& own = state.own;
    for (int row = threadIdx.x / Warps::kLanes; row < Policy::kOwn; row += kThreads / Warps::kLanes) {
      int p[kMaxRank], begin[kMaxRank];
      bool present = true;
      for (int a = 0; a < kMaxRank; ++a) {
        int const place = own.tokens.shape.at(row, a);
        p[a] = own.origin[a] + place;
        begin[a] = state.windows[a][place].begin;
        present = present && p[a] < own.tokens.box[a].end;
      }
      if (!present) continue;
      clear_unused(state.weights + state.own_offsets[row] + params.slots.of_position(begin), params.slots,
                   params.problem, own.group, p, Element(params.unused));
    }
  }
};

template <class Policy, class Launch>
void run_gemm_qk(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Kernel = GemmQk<Policy>;
  auto const params = Kernel::Block::make_params(arguments, context);
  launch(Kernel{}, params, std::min(params.partition.items, context.max_blocks), Kernel::kSharedBytes);
}

}  // namespace natten::cuda
