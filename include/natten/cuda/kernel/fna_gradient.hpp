// SPDX-License-Identifier: MIT
// Gradients of fused neighborhood attention. One kernel for both sides: a block owns a tile of queries and streams keys
// (gradient of the query), or owns a tile of keys and streams the queries of its inverse window (gradients of key and
// value). Everything is gathered: no atomics, the same bits in every run.
//
//   first:   query and key, of either side; second: gradient of the output, and value
//   scores = own_first streamed_first^T          probabilities = exp(scores - lse)
//   slopes = own_second streamed_second^T        d_scores = probabilities * (slopes - delta)
//   d_first = d_scores streamed_first            d_second = probabilities streamed_second
#pragma once

#include "natten/cuda/collective/bias_gradient.hpp"
#include "natten/cuda/collective/product.hpp"
#include "natten/cuda/collective/scores.hpp"
#include "natten/cuda/collective/stream.hpp"

namespace natten::cuda {

// kSide: of the tokens that a block owns, and whose gradients it finds.
template <class Policy, Side kSide>
struct FnaGradient {
  using Element = typename Policy::Element;
  static constexpr int kHeadDim = Policy::kHeadDim;
  static constexpr int kOwn = Policy::kOwn;
  static constexpr int kStreamed = Policy::kStreamed;
  static constexpr int kStages = Policy::kStages;
  static constexpr int kThreads = Policy::kThreads;
  static constexpr int kMinBlocks = 1;

  static constexpr bool kOwnsQueries = kSide == Side::kQuery;
  static constexpr Side kOtherSide = kOwnsQueries ? Side::kKey : Side::kQuery;
  static constexpr int kWalks = kOwnsQueries ? 2 : 1;

  using OwnTile = typename Policy::OwnTile;
  using StreamedTile = typename Policy::StreamedTile;
  using State = BlockState<kOwn, kStreamed, kWalks>;

  struct Params {
    Problem problem;
    TensorRef query, key, value, additional_keys, additional_values, d_output, lse, delta;
    TensorRef d_query, d_key, d_value, d_additional_keys, d_additional_values;
    float const* rpb;
    float* d_rpb;  // a table for each block, in the workspace; null: no gradient of the bias wanted
    Partition partition;
    BiasIndex bias;
    std::int64_t additional_items;  // of the key side: tiles of additional keys, behind those of the grid
    LogitScale scale;
    bool query_vectors, key_vectors, value_vectors, d_output_vectors, additional_key_vectors, additional_value_vectors;
    bool d_query_vectors, d_key_vectors, d_value_vectors, d_additional_key_vectors, d_additional_value_vectors;
  };

  static constexpr int kSecondBegin = OwnTile::kBytes;
  static constexpr int kRingBegin = 2 * OwnTile::kBytes;
  static constexpr int kPairBytes = 2 * StreamedTile::kBytes;
  static constexpr int kScoresBegin = kRingBegin + kStages * kPairBytes;
  static constexpr int kColumnsBegin = kScoresBegin + score_bytes<Policy>();
  static constexpr int kStateBegin =  // after lse and delta of the streamed queries
      kColumnsBegin + (!kOwnsQueries ? kStages * 2 * kStreamed * int(sizeof(float)) : 0);
  static constexpr int kBiasBegin = kStateBegin + (int(sizeof(State)) + 15) / 16 * 16;
  using BiasTile = BiasGradient<kOwn, kStreamed, kThreads>;
  static_assert(kBiasBegin + (kOwnsQueries ? BiasTile::kBytes : 0) <= Policy::kMaxSharedBytes,
                "the tiles are too large");

  static int shared_bytes(Params const& params) {
    return kBiasBegin + (params.d_rpb == nullptr ? 0 : BiasTile::kBytes);
  }

  static Params make_params(BackwardArguments const& a, LaunchContext const& context, TensorRef const& delta,
                            float* d_rpb) {
    Params p{};
    Problem const& problem = a.problem;
    p.problem = problem;
    p.query = a.query;
    p.key = a.key;
    p.value = a.value;
    p.additional_keys = a.additional_keys;
    p.additional_values = a.additional_values;
    p.d_output = a.d_output;
    p.lse = a.lse;
    p.delta = delta;
    p.d_query = a.d_query;
    p.d_key = a.d_key;
    p.d_value = a.d_value;
    p.d_additional_keys = a.d_additional_keys;
    p.d_additional_values = a.d_additional_values;
    p.rpb = static_cast<float const*>(a.rpb);
    p.d_rpb = d_rpb;
    p.partition = Partition::make(problem, kSide, kOwnsQueries ? context.by_query : context.by_key);
    p.bias = BiasIndex::make(problem);
    if (!kOwnsQueries) {
      p.additional_items = problem.batch * problem.heads_kv * ceil_div(problem.additional_keys, kOwn);
    }
    p.scale = LogitScale::make(problem);
    p.query_vectors = in_vectors<Element>(a.query, problem.head_dim);
    p.key_vectors = in_vectors<Element>(a.key, problem.head_dim);
    p.value_vectors = in_vectors<Element>(a.value, problem.head_dim_value);
    p.d_output_vectors = in_vectors<Element>(a.d_output, problem.head_dim_value);
    p.additional_key_vectors = in_vectors<Element>(a.additional_keys, problem.head_dim);
    p.additional_value_vectors = in_vectors<Element>(a.additional_values, problem.head_dim_value);
    p.d_query_vectors = in_vectors<Element>(a.d_query, problem.head_dim);
    p.d_key_vectors = in_vectors<Element>(a.d_key, problem.head_dim);
    p.d_value_vectors = in_vectors<Element>(a.d_value, problem.head_dim_value);
    p.d_additional_key_vectors = in_vectors<Element>(a.d_additional_keys, problem.head_dim);
    p.d_additional_value_vectors = in_vectors<Element>(a.d_additional_values, problem.head_dim_value);
    return p;
  }

  // Where the bias has a gradient, a block stays with one head (heads run fastest) and sums into a table of its own.
  static std::int64_t blocks(Params const& params, std::int64_t tables, LaunchContext const& context) {
    return std::min(params.partition.items + params.additional_items,
                    params.d_rpb == nullptr ? context.max_blocks : tables);
  }

  CUTE_DEVICE void operator()(Params const& params, char* shared) const {
    State& state = *reinterpret_cast<State*>(shared + kStateBegin);
    float* const table =
        params.d_rpb == nullptr ? nullptr : params.d_rpb + std::int64_t{blockIdx.x} * params.bias.entries;
    if (table != nullptr) {
      for (int i = threadIdx.x; i < params.bias.entries; i += kThreads) table[i] = 0;
    }
    for (std::int64_t item = blockIdx.x; item < params.partition.items + params.additional_items; item += gridDim.x) {
      prepare(params, state, item);
      if (!state.own.is_empty) differentiate(params, state, shared, table);
      __syncthreads();
    }
  }

 private:
  // A tensor of the own side: of the grid's tokens, or of the additional ones.
  struct OwnTensor {
    TokenView view;
    bool vectors;
  };
  CUTE_DEVICE static OwnTensor own_tensor(Params const& p, State const& state, TensorRef const& tensor, bool vectors,
                                          TensorRef const& additional, bool additional_vectors) {
    if (!kOwnsQueries && state.walks[0].is_dense) {
      return {plain_view_of<Element>(additional, state.own, state.own.head), additional_vectors};
    }
    return {view_of<kSide, Element>(tensor, p.problem, state.own, state.own.head), vectors};
  }

  CUTE_DEVICE static void prepare(Params const& params, State& state, std::int64_t item) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    bool const is_additional = item >= params.partition.items;
    if (!is_additional) {
      find_block<kSide, kThreads>(state, params.partition, problem, item, thread);
    } else if (thread == 0) {
      state.own.locate_additional(params.partition, problem.additional_keys, item - params.partition.items);
    }
    if (params.rpb != nullptr && !is_additional) find_bias<kSide, kThreads>(state, params.bias, thread);
    if (thread == 0) {
      Own const& own = state.own;
      Walk& walk = state.walks[0];
      if constexpr (kOwnsQueries) {
        int const head_kv = own.head / problem.group_size();
        walk.first = view_of<kOtherSide, Element>(params.key, problem, own, head_kv);
        walk.second = view_of<kOtherSide, Element>(params.value, problem, own, head_kv);
        walk.vectors_first = params.key_vectors;
        walk.vectors_second = params.value_vectors;
        Walk& additional = state.walks[1];
        make_dense(additional, params.partition.streamed_additional, {{0, 1}, {0, 1}, {0, problem.additional_keys}});
        additional.first = plain_view_of<Element>(params.additional_keys, own, head_kv);
        additional.second = plain_view_of<Element>(params.additional_values, own, head_kv);
        additional.vectors_first = params.additional_key_vectors;
        additional.vectors_second = params.additional_value_vectors;
        state.laps = kWalks;
        state.tiles = walk.count + additional.count;
      } else {
        int const head = own.head * problem.group_size();
        if (is_additional) {  // attended by all queries, whatever their group
          make_dense(walk, params.partition.streamed,
                     {{0, problem.axes[0].query_extent},
                      {0, problem.axes[1].query_extent},
                      {0, problem.axes[2].query_extent}});
          walk.first = plain_view_of<Element>(params.query, own, head);
          walk.second = plain_view_of<Element>(params.d_output, own, head);
          walk.lse = plain_view_of<float>(params.lse, own, head);
          walk.delta = plain_view_of<float>(params.delta, own, head);
        } else {
          walk.first = view_of<kOtherSide, Element>(params.query, problem, own, head);
          walk.second = view_of<kOtherSide, Element>(params.d_output, problem, own, head);
          walk.lse = view_of<kOtherSide, float>(params.lse, problem, own, head);
          walk.delta = view_of<kOtherSide, float>(params.delta, problem, own, head);
        }
        walk.lap_first = params.query.stride_head;
        walk.lap_second = params.d_output.stride_head;
        walk.vectors_first = params.query_vectors;
        walk.vectors_second = params.d_output_vectors;
        state.laps = problem.group_size();
        state.tiles = walk.count * state.laps;
      }
    }
    __syncthreads();
  }

  // A query's LSE and delta. Its probabilities are exp(-infinity) = 0 where it is not there, or has no keys.
  struct Row {
    float lse = INFINITY;
    float delta = 0;
  };
  CUTE_DEVICE static Row read_row(TokenView const& lse, TokenView const& delta, TokenBox const& tokens,
                                  int const (&origin)[kMaxRank], int token) {
    int p[kMaxRank];
    bool present = true;
    for (int a = 0; a < kMaxRank; ++a) {
      p[a] = origin[a] + tokens.shape.at(token, a);
      present = present && p[a] < tokens.box[a].end;
    }
    Row row;
    if (!present) return row;
    float const natural = *lse.token<float const>(p[0], p[1], p[2]);
    if (natural != -INFINITY) row.lse = natural;
    row.delta = *delta.token<float const>(p[0], p[1], p[2]);
    return row;
  }

  CUTE_DEVICE static void differentiate(Params const& params, State const& state, char* shared, float* table) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    Own const& own = state.own;
    auto const load_own = [&](OwnTensor const& tensor, int head_dim, char* tile) {
      load_tile<OwnTile, Policy, kThreads, Element, kOwn, kHeadDim>(tensor.view, own.tokens, own.origin, head_dim,
                                                                    tensor.vectors, tile, thread);
    };
    load_own(kOwnsQueries ? own_tensor(params, state, params.query, params.query_vectors, {}, false)
                          : own_tensor(params, state, params.key, params.key_vectors, params.additional_keys,
                                       params.additional_key_vectors),
             problem.head_dim, shared);
    load_own(kOwnsQueries ? own_tensor(params, state, params.d_output, params.d_output_vectors, {}, false)
                          : own_tensor(params, state, params.value, params.value_vectors, params.additional_values,
                                       params.additional_value_vectors),
             problem.head_dim_value, shared + kSecondBegin);

    auto const load = [&](int tile, Cursor const& at) {
      Walk const& walk = state.walk_of(at);
      int const lap = !kOwnsQueries ? at.lap : 0;
      load_tile<StreamedTile, Policy, kThreads, Element, kStreamed, kHeadDim>(
          walk.first.template moved<Element>(lap * walk.lap_first), walk.tokens, at.origin, problem.head_dim,
          walk.vectors_first, first_slot(shared, tile), thread);
      load_tile<StreamedTile, Policy, kThreads, Element, kStreamed, kHeadDim>(
          walk.second.template moved<Element>(lap * walk.lap_second), walk.tokens, at.origin, problem.head_dim_value,
          walk.vectors_second, first_slot(shared, tile) + StreamedTile::kBytes, thread);
      if constexpr (!kOwnsQueries) {
        TokenView const lap_lse = walk.lse.template moved<float>(lap * params.lse.stride_head);
        TokenView const lap_delta = walk.delta.template moved<float>(lap * params.delta.stride_head);
        for (int i = thread; i < kStreamed; i += kThreads) {
          Row const row = read_row(lap_lse, lap_delta, walk.tokens, at.origin, i);
          columns(shared, tile)[i] = row.lse;
          columns(shared, tile)[kStreamed + i] = row.delta;
        }
      }
    };

    auto const coordinates = score_coordinates<Policy>(thread);
    constexpr int kRows = decltype(size<0>(coordinates))::value;
    constexpr int kColumns = decltype(size<1>(coordinates))::value;
    Row rows[kRows];
    if constexpr (kOwnsQueries) {
      TokenView const lse = view_of<kSide, float>(params.lse, problem, own, own.head);
      TokenView const delta = view_of<kSide, float>(params.delta, problem, own, own.head);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        rows[r] = read_row(lse, delta, own.tokens, own.origin, get<0>(coordinates(r, 0)));
      }
    }
    auto d_first = make_accumulator<typename Policy::MmaTransposed, kOwn, kHeadDim>();
    auto d_second = make_accumulator<typename Policy::MmaTransposed, kOwn, kHeadDim>();

    stream_tiles<Policy>(state, load, [&](int tile, Cursor const& cursor, auto const& arrive) {
      Walk const& walk = state.walk_of(cursor);
      bool const has_bias = params.rpb != nullptr && !walk.is_dense;
      arrive();
      char* const first = first_slot(shared, tile);
      char* const second = first + StreamedTile::kBytes;

      auto scores = make_accumulator<typename Policy::Mma, kOwn, kStreamed>();
      multiply_tokens<Policy>(scores, shared, first, thread);
      auto scores_rows = make_tensor(scores.data(), Policy::rows_by_columns(scores.layout()));
      int const head = kOwnsQueries ? own.head : own.head * problem.group_size() + cursor.lap;
      int const sign = kOwnsQueries ? 1 : -1;  // of the streamed side's positions in the bias table
      finish_scores(scores_rows, coordinates, state, walk, cursor.origin, cursor.is_interior(walk), params.scale.before,
                    has_bias ? params.rpb + std::int64_t{head} * params.bias.entries : nullptr,
                    sign * params.bias.of_position(cursor.origin));
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          float const row_lse = kOwnsQueries ? rows[r].lse : columns(shared, tile)[get<1>(coordinates(0, c))];
          scores_rows(r, c) = exp2f((params.scale.natural(scores_rows(r, c)) - row_lse) * kLog2E);
        }
      }
      if constexpr (!kOwnsQueries) multiply_scores<Policy>(d_second, scores, second, shared + kScoresBegin, thread);
      auto slopes = make_accumulator<typename Policy::Mma, kOwn, kStreamed>();
      multiply_tokens<Policy>(slopes, shared + kSecondBegin, second, thread);
      auto slopes_rows = make_tensor(slopes.data(), Policy::rows_by_columns(slopes.layout()));
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          float const row_delta =
              kOwnsQueries ? rows[r].delta : columns(shared, tile)[kStreamed + get<1>(coordinates(0, c))];
          scores_rows(r, c) *= slopes_rows(r, c) - row_delta;
        }
      }
      multiply_scores<Policy>(d_first, scores, first, shared + kScoresBegin, thread);
      if constexpr (kOwnsQueries) {
        if (table != nullptr && has_bias) {
          BiasTile::add(scores_rows, coordinates, state, cursor.origin, problem, params.bias, shared + kBiasBegin,
                        table, thread < Policy::kScoreThreads, thread);
        }
      }
    });

    // The own tiles become the gradients', once the last streamed tile has been multiplied with them.
    __syncthreads();
    auto const store_own = [&](auto const& accumulator, OwnTensor const& tensor, int head_dim, char* tile) {
      store_accumulator<Policy>(accumulator, tile, tensor.view, own, head_dim, tensor.vectors, thread);
    };
    CUTE_UNROLL
    for (int i = 0; i < size(d_first); ++i) d_first(i) *= float(problem.scale);
    store_own(d_first,
              kOwnsQueries ? own_tensor(params, state, params.d_query, params.d_query_vectors, {}, false)
                           : own_tensor(params, state, params.d_key, params.d_key_vectors, params.d_additional_keys,
                                        params.d_additional_key_vectors),
              problem.head_dim, shared);
    if constexpr (!kOwnsQueries) {
      store_own(d_second,
                own_tensor(params, state, params.d_value, params.d_value_vectors, params.d_additional_values,
                           params.d_additional_value_vectors),
                problem.head_dim_value, shared + kSecondBegin);
    }
  }

  CUTE_DEVICE static char* first_slot(char* shared, int tile) {
    return shared + kRingBegin + tile % kStages * kPairBytes;
  }
  CUTE_DEVICE static float* columns(char* shared, int tile) {
    return reinterpret_cast<float*>(shared + kColumnsBegin) + tile % kStages * 2 * kStreamed;
  }
};

}  // namespace natten::cuda
