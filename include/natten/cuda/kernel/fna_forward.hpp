// SPDX-License-Identifier: MIT
// Fused neighborhood attention: a block owns a tile of queries and streams the tiles of its key box past it, with an
// online softmax (FlashAttention-2, arXiv:2307.08691, over the tiles of arXiv:2403.04690).
#pragma once

#include "natten/cuda/collective/multiply.hpp"
#include "natten/cuda/collective/product.hpp"
#include "natten/cuda/collective/scores.hpp"
#include "natten/cuda/collective/stream.hpp"

namespace natten::cuda {

template <class Policy>
struct FnaForward {
  using Element = typename Policy::Element;
  static constexpr int kHeadDim = Policy::kHeadDim;
  static constexpr int kOwn = Policy::kOwn;
  static constexpr int kStreamed = Policy::kStreamed;
  static constexpr int kStages = Policy::kStages;
  static constexpr int kThreads = Policy::kThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kWalks = 2;  // the window, and the additional keys

  using OwnTile = typename Policy::OwnTile;
  using StreamedTile = typename Policy::StreamedTile;
  using State = BlockState<kOwn, kStreamed, kWalks>;

  struct Params {
    Problem problem;
    TensorRef query, key, value, additional_keys, additional_values, output, lse;
    float const* rpb;
    Partition partition;
    BiasIndex bias;
    LogitScale scale;
    bool query_vectors, key_vectors, value_vectors, additional_key_vectors, additional_value_vectors, output_vectors;
  };

  // One place in shared memory after the other.
  static constexpr int kRingBegin = OwnTile::kBytes;
  static constexpr int kScoresBegin = kRingBegin + kStages * StreamedTile::kBytes;
  static constexpr int kStateBegin = kScoresBegin + score_bytes<Policy>();
  static constexpr int kSharedBytes = kStateBegin + int(sizeof(State));
  static_assert(kSharedBytes <= Policy::kMaxSharedBytes, "the tiles are too large");

  static Params make_params(ForwardArguments const& a, LaunchContext const& context) {
    Params p{};
    p.problem = a.problem;
    p.query = a.query;
    p.key = a.key;
    p.value = a.value;
    p.additional_keys = a.additional_keys;
    p.additional_values = a.additional_values;
    p.output = a.output;
    p.lse = a.lse;
    p.rpb = static_cast<float const*>(a.rpb);
    p.partition = Partition::make(a.problem, Side::kQuery, context.by_query);
    p.bias = BiasIndex::make(a.problem);
    p.scale = LogitScale::make(a.problem);
    p.query_vectors = in_vectors<Element>(a.query, a.problem.head_dim);
    p.key_vectors = in_vectors<Element>(a.key, a.problem.head_dim);
    p.value_vectors = in_vectors<Element>(a.value, a.problem.head_dim_value);
    p.additional_key_vectors = in_vectors<Element>(a.additional_keys, a.problem.head_dim);
    p.additional_value_vectors = in_vectors<Element>(a.additional_values, a.problem.head_dim_value);
    p.output_vectors = in_vectors<Element>(a.output, a.problem.head_dim_value);
    return p;
  }

  CUTE_DEVICE void operator()(Params const& params, char* shared) const {
    State& state = *reinterpret_cast<State*>(shared + kStateBegin);
    for (std::int64_t item = blockIdx.x; item < params.partition.items; item += gridDim.x) {
      prepare(params, state, item);
      if (!state.own.is_empty) attend(params, state, shared);
      __syncthreads();
    }
  }

 private:
  CUTE_DEVICE static void prepare(Params const& params, State& state, std::int64_t item) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    find_block<Side::kQuery, kThreads>(state, params.partition, problem, item, thread);
    if (params.rpb != nullptr) find_bias<Side::kQuery, kThreads>(state, params.bias, thread);
    if (thread == 0) {
      int const head_kv = state.own.head / problem.group_size();
      Walk& window = state.walks[0];
      window.first = view_of<Side::kKey, Element>(params.key, problem, state.own, head_kv);
      window.second = view_of<Side::kKey, Element>(params.value, problem, state.own, head_kv);
      window.vectors_first = params.key_vectors;
      window.vectors_second = params.value_vectors;

      Walk& additional = state.walks[1];
      make_dense(additional, params.partition.streamed_additional, {{0, 1}, {0, 1}, {0, problem.additional_keys}});
      additional.first = plain_view_of<Element>(params.additional_keys, state.own, head_kv);
      additional.second = plain_view_of<Element>(params.additional_values, state.own, head_kv);
      additional.vectors_first = params.additional_key_vectors;
      additional.vectors_second = params.additional_value_vectors;
      state.laps = kWalks;
      state.tiles = window.count + additional.count;
    }
    __syncthreads();
  }

  CUTE_DEVICE static void attend(Params const& params, State const& state, char* shared) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    Own const& own = state.own;
    load_tile<OwnTile, Policy, kThreads, Element, kOwn, kHeadDim>(
        view_of<Side::kQuery, Element>(params.query, problem, own, own.head), own.tokens, own.origin, problem.head_dim,
        params.query_vectors, shared, thread);

    // Step 2j brings the keys of tile j, step 2j + 1 its values.
    auto const load = [&](int step, Cursor const& at) {
      Walk const& walk = state.walk_of(at);
      bool const is_value = step & 1;
      load_tile<StreamedTile, Policy, kThreads, Element, kStreamed, kHeadDim>(
          is_value ? walk.second : walk.first, walk.tokens, at.origin,
          is_value ? problem.head_dim_value : problem.head_dim, is_value ? walk.vectors_second : walk.vectors_first,
          slot(shared, step), thread);
    };

    auto const coordinates = score_coordinates<Policy>(thread);
    constexpr int kRows = decltype(size<0>(coordinates))::value;
    auto output = make_accumulator<typename Policy::MmaTransposed, kOwn, kHeadDim>();
    auto output_rows = make_tensor(output.data(), Policy::transposed_rows_by_columns(output.layout()));
    float maximum[kRows], sum[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float const missing = missing_of_row(problem, state, get<0>(coordinates(r, 0)));
      maximum[r] = missing > 0 ? 0.0f : -INFINITY;  // keys with logit 0
      sum[r] = get<1>(coordinates(r, 0)) == 0 ? missing : 0.0f;
    }
    float const* const bias =
        params.rpb == nullptr ? nullptr : params.rpb + std::int64_t{own.head} * params.bias.entries;

    stream_tiles<Policy, 2>(state, load, [&](int tile, Cursor const& cursor, auto const& arrive) {
      Walk const& walk = state.walk_of(cursor);
      bool const in_window = cursor.lap == 0;
      arrive();
      auto scores = make_accumulator<typename Policy::Mma, kOwn, kStreamed>();
      multiply_tokens<Policy>(scores, shared, slot(shared, 2 * tile), thread);
      auto scores_rows = make_tensor(scores.data(), Policy::rows_by_columns(scores.layout()));
      finish_scores(scores_rows, coordinates, state, walk, cursor.origin, cursor.is_interior(walk), params.scale.before,
                    in_window ? bias : nullptr, params.bias.of_position(cursor.origin));

      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float highest = maximum[r];
        CUTE_UNROLL
        for (int c = 0; c < size<1>(scores_rows); ++c) highest = Maximum{}(highest, scores_rows(r, c));
        highest = reduce_row<Policy::kRowLanes>(highest, Maximum{});
        // A row without keys so far keeps zeros: -infinity minus -infinity would be NaN.
        float const base = highest == -INFINITY ? 0.0f : highest;
        float const correction = exp2f((maximum[r] - base) * params.scale.to_base2);
        maximum[r] = highest;
        sum[r] *= correction;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(scores_rows); ++c) {
          scores_rows(r, c) = exp2f((scores_rows(r, c) - base) * params.scale.to_base2);
          sum[r] += scores_rows(r, c);
        }
        CUTE_UNROLL
        for (int c = 0; c < size<1>(output_rows); ++c) output_rows(r, c) *= correction;
      }
      arrive();
      multiply_scores<Policy>(output, scores, slot(shared, 2 * tile + 1), shared + kScoresBegin, thread);
    });

    TokenView const lse_view = view_of<Side::kQuery, float>(params.lse, problem, own, own.head);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = reduce_row<Policy::kRowLanes>(sum[r], Sum{});
      float const inverse = sum[r] == 0 ? 0.0f : 1 / sum[r];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(output_rows); ++c) output_rows(r, c) *= inverse;
      int const row = get<0>(coordinates(r, 0));
      int p[kMaxRank];
      bool present = thread < Policy::kScoreThreads && get<1>(coordinates(r, 0)) == 0;  // one thread of the row
      for (int a = 0; a < kMaxRank; ++a) {
        p[a] = own.origin[a] + own.tokens.shape.at(row, a);
        present = present && p[a] < own.tokens.box[a].end;
      }
      if (present) {
        *lse_view.token<float>(p[0], p[1], p[2]) =
            sum[r] == 0 ? -INFINITY : params.scale.natural(maximum[r]) + kLn2 * log2f(sum[r]);
      }
    }
    store_accumulator<Policy>(output, shared, view_of<Side::kQuery, Element>(params.output, problem, own, own.head),
                              own, problem.head_dim_value, params.output_vectors, thread);
  }

  CUTE_DEVICE static char* slot(char* shared, int step) {
    return shared + kRingBegin + step % kStages * StreamedTile::kBytes;
  }

  // Keys that boundary "zeros" counts beyond the grid, for the query of this row.
  CUTE_DEVICE static float missing_of_row(Problem const& problem, State const& state, int row) {
    int counted[kMaxRank], present[kMaxRank];
    bool misses_none = true;
    for (int a = 0; a < kMaxRank; ++a) {
      int const p = state.own.origin[a] + state.own.tokens.shape.at(row, a);
      if (p >= state.own.tokens.box[a].end) return 0;
      Group const group = problem.axes[a].group(state.own.group[a]);
      counted[a] = group.counted(p);
      present[a] = group.window(p).size();
      misses_none = misses_none && counted[a] == present[a];
    }
    // Most rows: they are spared numbers of double precision, which few GPUs are fast in.
    return misses_none ? 0.0f : float(missing_keys(counted, present));
  }
};

template <class Policy, class Launch>
void run_fna_forward(ForwardArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Kernel = FnaForward<Policy>;
  auto const params = Kernel::make_params(arguments, context);
  launch(Kernel{}, params, std::min(params.partition.items, context.max_blocks), Kernel::kSharedBytes);
}

}  // namespace natten::cuda
