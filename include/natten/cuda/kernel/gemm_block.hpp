// SPDX-License-Identifier: MIT
// What the unfused kernels with tiles share: a block owns a tile of queries or of keys, streams the tiles of the other side
// past it, as the fused kernels do, and knows where the weight of each pair stands.
#pragma once

#include "natten/cuda/collective/product.hpp"
#include "natten/cuda/collective/stream.hpp"
#include "natten/cuda/collective/weights.hpp"

namespace natten::cuda {

// kSide: of the tokens that a block owns.
template <class Policy, Side kSide, int kThreads>
struct GemmBlock {
  using Element = typename Policy::Element;
  static constexpr int kHeadDim = Policy::kHeadDim;
  static constexpr int kOwn = Policy::kOwn;
  static constexpr int kStreamed = Policy::kStreamed;
  static constexpr bool kOwnsQueries = kSide == Side::kQuery;
  static constexpr Side kOtherSide = kOwnsQueries ? Side::kKey : Side::kQuery;

  using OwnTile = typename Policy::OwnTile;
  using StreamedTile = typename Policy::StreamedTile;
  static constexpr int kRingBytes = Policy::kStages * StreamedTile::kBytes;

  struct Params {
    Problem problem;
    TensorRef own, streamed, weights;
    float const* rpb;
    float unused;
    Partition partition;
    BiasIndex bias;
    SlotIndex slots;
    bool own_vectors, streamed_vectors;
  };

  struct State : BlockState<kOwn, kStreamed, 1> {
    Element* weights;  // of the own head, or the first that reads its keys
    std::int64_t own_offsets[kOwn];
    // Of queries, those of a tile change with its place: they are found when it is loaded.
    std::int64_t streamed_offsets[kOwnsQueries ? 1 : Policy::kStages][kStreamed];
  };

  static Params make_params(UnfusedArguments const& a, LaunchContext const& context) {
    Params p{};
    p.problem = a.problem;
    p.own = kOwnsQueries ? a.query : a.key;
    p.streamed = kOwnsQueries ? a.key : a.query;
    p.weights = a.weights;
    p.rpb = static_cast<float const*>(a.rpb);
    p.unused = static_cast<float>(a.unused);
    p.partition = Partition::make(a.problem, kSide, kOwnsQueries ? context.by_query : context.by_key);
    p.bias = BiasIndex::make(a.problem);
    p.slots = SlotIndex::make(a.problem);
    p.own_vectors = in_vectors<Element>(p.own, a.problem.head_dim);
    p.streamed_vectors = in_vectors<Element>(p.streamed, a.problem.head_dim);
    return p;
  }

  // compute(state) for every tile of the block.
  template <class Compute>
  CUTE_DEVICE static void for_each_tile(Params const& params, State& state, Compute const& compute) {
    for (std::int64_t item = blockIdx.x; item < params.partition.items; item += gridDim.x) {
      prepare(params, state, item);
      if (!state.own.is_empty) compute(state);
      __syncthreads();
    }
  }

  CUTE_DEVICE static TokenView own_view(Params const& params, State const& state) {
    return view_of<kSide, Element>(params.own, params.problem, state.own, state.own.head);
  }

  // As stream_tiles wants it.
  CUTE_DEVICE static void load(Params const& params, State& state, char* ring, int tile, Cursor const& at) {
    int const thread = threadIdx.x;
    Walk const& walk = state.walks[0];
    load_tile<StreamedTile, Policy, kThreads, Element, kStreamed, kHeadDim>(
        walk.first.template moved<Element>(at.lap * walk.lap_first), walk.tokens, at.origin, params.problem.head_dim,
        walk.vectors_first, slot(ring, tile), thread);
    if constexpr (!kOwnsQueries) {
      find_offsets<kOtherSide>(params, state, walk.tokens, at.origin, state.streamed_offsets[tile % Policy::kStages]);
    }
  }
  CUTE_DEVICE static char* slot(char* ring, int tile) { return ring + tile % Policy::kStages * StreamedTile::kBytes; }

  // visit(r, c, attended, weight): for every (row, column) of the scores, where its weight stands, if it has one.
  template <class Coordinates, class Visit>
  CUTE_DEVICE static void for_each_pair(Params const& params, State const& state, Coordinates const& coordinates,
                                        int tile, Cursor const& cursor, Visit const& visit) {
    Element* const weights = state.weights + (kOwnsQueries ? std::int64_t{params.slots.of_position(cursor.origin)}
                                                           : cursor.lap * params.weights.stride_head);
    std::int64_t const* const offsets = state.streamed_offsets[kOwnsQueries ? 0 : tile % Policy::kStages];
    int const first_column = get<1>(coordinates(0, 0));
    CUTE_UNROLL
    for (int r = 0; r < size<0>(coordinates); ++r) {
      int const row = get<0>(coordinates(r, 0));
      auto const columns = state.columns_of(row, state.walks[0], cursor.origin) >> first_column;
      Element* const of_row = weights + state.own_offsets[row];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(coordinates); ++c) {
        int const column = get<1>(coordinates(r, c));
        visit(r, c, bool((columns >> (column - first_column)) & 1), of_row + offsets[column]);
      }
    }
  }

 private:
  CUTE_DEVICE static void prepare(Params const& params, State& state, std::int64_t item) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    find_block<kSide, kThreads>(state, params.partition, problem, item, thread);
    if (params.rpb != nullptr) find_bias<kSide, kThreads>(state, params.bias, thread);
    find_offsets<kSide>(params, state, state.own.tokens, state.own.origin, state.own_offsets);
    TileShape const& shape = params.partition.streamed;
    if constexpr (kOwnsQueries) {
      for (int i = thread; i < kStreamed; i += kThreads) {
        state.streamed_offsets[0][i] = params.slots.of_position({shape.at(i, 0), shape.at(i, 1), shape.at(i, 2)});
      }
    }
    if (thread == 0) {
      int const head = state.own.head;
      int const group_size = problem.group_size();
      Walk& walk = state.walks[0];
      state.laps = kOwnsQueries ? 1 : group_size;
      state.tiles = walk.count * state.laps;
      walk.first = view_of<kOtherSide, Element>(params.streamed, problem, state.own,
                                                kOwnsQueries ? head / group_size : head * group_size);
      walk.lap_first = params.streamed.stride_head;
      walk.vectors_first = params.streamed_vectors;
      TokenView const view = weights_view(params, state);
      state.weights = reinterpret_cast<Element*>(const_cast<char*>(view.data));
    }
    __syncthreads();
  }

  CUTE_DEVICE static TokenView weights_view(Params const& params, State const& state) {
    int const head = state.own.head * (kOwnsQueries ? 1 : params.problem.group_size());
    return view_of<Side::kQuery, Element>(params.weights, params.problem, state.own, head);
  }

  // Of the tokens of a tile; 0 for those that are not there.
  template <Side kOfSide, int kTokens>
  CUTE_DEVICE static void find_offsets(Params const& params, State const& state, TokenBox const& tokens,
                                       int const (&origin)[kMaxRank], std::int64_t (&offsets)[kTokens]) {
    TokenView const view = weights_view(params, state);
    for (int i = threadIdx.x; i < kTokens; i += kThreads) {
      int p[kMaxRank];
      bool present = true;
      for (int a = 0; a < kMaxRank; ++a) {
        p[a] = origin[a] + tokens.shape.at(i, a);
        present = present && p[a] < tokens.box[a].end;
      }
      offsets[i] = present ? weight_offset<kOfSide>(view, params.slots, params.problem, state.own.group, p) : 0;
    }
  }
};

}  // namespace natten::cuda
