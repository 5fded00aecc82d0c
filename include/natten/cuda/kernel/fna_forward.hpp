// SPDX-License-Identifier: MIT
// Fused neighborhood attention: a block owns a tile of queries and streams the tiles of its key box past it, with an
// online softmax (FlashAttention-2, arXiv:2307.08691, over the tiles of arXiv:2403.04690).
#pragma once

#include "natten/cuda/collective/multiply.hpp"
#include "natten/cuda/collective/product.hpp"
#include "natten/cuda/collective/scores.hpp"
#include "natten/cuda/library.hpp"

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
    float prescale;      // of the dot products, where they are scaled before the softmax
    float softmax_scale; // of the logits inside the exponential of base 2
    bool query_vectors, key_vectors, value_vectors, additional_key_vectors, additional_value_vectors, output_vectors;
  };

  // One place in shared memory after the other.
  static constexpr int kRingBegin = OwnTile::kBytes;
  static constexpr int kScoresBegin = kRingBegin + kStages * StreamedTile::kBytes;
  static constexpr int kStateBegin = kScoresBegin + (Policy::kOperandInRegisters ? 0 : Policy::ScoreTile::kBytes);
  static constexpr int kSharedBytes = kStateBegin + int(sizeof(State));

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
    // exp(scale * s) = exp2(c * s): one multiply-add with the maximum, which a negative scale or a bias forbids.
    float const c = float(a.problem.scale) * kLog2E;
    bool const before = a.problem.has_rpb || !(c >= 0);
    p.prescale = before ? c : 1.0f;
    p.softmax_scale = before ? 1.0f : c;
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
    if (thread == 0) state.own.locate(params.partition, item);
    __syncthreads();
    if (thread < kMaxRank) find_axis<Side::kQuery>(state, params.partition, problem.axes[thread], thread);
    __syncthreads();
    find_windows<Side::kQuery, kThreads>(state, problem, thread);
    if (params.rpb != nullptr) {
      int const corner = params.bias.corner - params.bias.of_position(state.own.origin);
      for (int i = thread; i < kOwn; i += kThreads) {
        state.bias_row[i] = corner - params.bias.of_token(params.partition.own, i);
      }
      for (int i = thread; i < kStreamed; i += kThreads) {
        state.bias_column[i] = params.bias.of_token(params.partition.streamed, i);
      }
    }
    if (thread == 0) {
      Own& own = state.own;
      own.is_empty = false;
      int dilation[kMaxRank], key_origin[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) {
        own.is_empty = own.is_empty || own.origin[a] >= own.tokens.box[a].end;
        dilation[a] = problem.axes[a].dilation;
        key_origin[a] = problem.axes[a].key_origin;
      }
      int const head_kv = own.head / problem.group_size();
      Walk& window = state.walks[0];
      window.tokens.shape = params.partition.streamed;
      window.is_dense = false;
      window.count_tiles();
      window.first = view_of<Element>(params.key, own.batch, head_kv, own.group, dilation, key_origin);
      window.second = view_of<Element>(params.value, own.batch, head_kv, own.group, dilation, key_origin);
      window.vectors_first = params.key_vectors;
      window.vectors_second = params.value_vectors;

      int const zeros[kMaxRank] = {0, 0, 0}, ones[kMaxRank] = {1, 1, 1};
      Walk& additional = state.walks[1];
      additional.tokens.shape = params.partition.streamed_additional;
      for (int a = 0; a < kMaxRank; ++a) {
        additional.tokens.box[a] = {0, a == kMaxRank - 1 ? problem.additional_keys : 1};
        additional.interior[a] = additional.tokens.box[a];
      }
      additional.is_dense = true;
      additional.count_tiles();
      additional.first = view_of<Element>(params.additional_keys, own.batch, head_kv, zeros, ones, zeros);
      additional.second = view_of<Element>(params.additional_values, own.batch, head_kv, zeros, ones, zeros);
      additional.vectors_first = params.additional_key_vectors;
      additional.vectors_second = params.additional_value_vectors;
    }
    __syncthreads();
  }

  CUTE_DEVICE static void attend(Params const& params, State const& state, char* shared) {
    int const thread = threadIdx.x;
    Problem const& problem = params.problem;
    Own const& own = state.own;
    int const tiles = state.walks[0].count + state.walks[1].count;

    TokenView query_view;
    {
      int dilation[kMaxRank], query_origin[kMaxRank];
      for (int a = 0; a < kMaxRank; ++a) {
        dilation[a] = problem.axes[a].dilation;
        query_origin[a] = problem.axes[a].query_origin;
      }
      query_view = view_of<Element>(params.query, own.batch, own.head, own.group, dilation, query_origin);
    }
    load_tile<OwnTile, Policy, kThreads, Element, kOwn, kHeadDim>(query_view, own.tokens, own.origin, problem.head_dim,
                                                                  params.query_vectors, shared, thread);

    // Step 2j brings the keys of tile j, step 2j + 1 its values. A step's load is issued kStages - 1 steps ahead.
    Cursor ahead = first_tile(state);
    auto const issue = [&](int step) {
      if (step < 2 * tiles) {
        Walk const& walk = state.walks[ahead.lap];
        bool const is_value = step & 1;
        load_tile<StreamedTile, Policy, kThreads, Element, kStreamed, kHeadDim>(
            is_value ? walk.second : walk.first, walk.tokens, ahead.origin,
            is_value ? problem.head_dim_value : problem.head_dim, is_value ? walk.vectors_second : walk.vectors_first,
            slot(shared, step), thread);
        if (is_value) next_tile(ahead, state);
      }
      Policy::commit();
    };
    for (int step = 0; step < kStages - 1; ++step) issue(step);
    auto const arrive = [&](int step) {  // step's tile is there, and the one before it no longer read
      if constexpr (kStages == 1) {
        __syncthreads();
        issue(step);
        Policy::template wait<0>();
        __syncthreads();
      } else {
        Policy::template wait<kStages - 2>();
        __syncthreads();
        issue(step + kStages - 1);
      }
    };

    auto const coordinates = score_coordinates<Policy>(thread);
    constexpr int kRows = decltype(size<0>(coordinates))::value;
    auto output = make_accumulator<typename Policy::MmaTransposed, kOwn, kHeadDim>();
    auto output_rows = make_tensor(output.data(), Policy::transposed_rows_by_columns(output.layout()));
    float maximum[kRows], sum[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float const missing = missing_keys(problem, state, get<0>(coordinates(r, 0)));
      maximum[r] = missing > 0 ? 0.0f : -INFINITY;  // keys with logit 0
      sum[r] = get<1>(coordinates(r, 0)) == 0 ? missing : 0.0f;
    }
    float const* const bias =
        params.rpb == nullptr ? nullptr : params.rpb + std::int64_t{own.head} * params.bias.entries;

    Cursor cursor = first_tile(state);
    for (int tile = 0; tile < tiles; ++tile) {
      Walk const& walk = state.walks[cursor.lap];
      bool const in_window = cursor.lap == 0;
      arrive(2 * tile);
      auto scores = make_accumulator<typename Policy::Mma, kOwn, kStreamed>();
      multiply<typename Policy::Mma, typename Policy::CopyOwn, typename Policy::CopyStreamed>(
          scores, OwnTile::tensor(shared), StreamedTile::tensor(slot(shared, 2 * tile)), thread);
      auto scores_rows = make_tensor(scores.data(), Policy::rows_by_columns(scores.layout()));
      finish_scores(scores_rows, coordinates, state, walk, cursor.origin, cursor.is_interior(walk), params.prescale,
                    in_window ? bias : nullptr, params.bias.of_position(cursor.origin));

      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float highest = maximum[r];
        CUTE_UNROLL
        for (int c = 0; c < size<1>(scores_rows); ++c) highest = Maximum{}(highest, scores_rows(r, c));
        highest = reduce_row<Policy::kRowLanes>(highest, Maximum{});
        // A row without keys so far keeps zeros: -infinity minus -infinity would be NaN.
        float const base = highest == -INFINITY ? 0.0f : highest * params.softmax_scale;
        float const correction = exp2f(maximum[r] * params.softmax_scale - base);
        maximum[r] = highest;
        sum[r] *= correction;
        CUTE_UNROLL
        for (int c = 0; c < size<1>(scores_rows); ++c) {
          scores_rows(r, c) = exp2f(scores_rows(r, c) * params.softmax_scale - base);
          sum[r] += scores_rows(r, c);
        }
        CUTE_UNROLL
        for (int c = 0; c < size<1>(output_rows); ++c) output_rows(r, c) *= correction;
      }
      arrive(2 * tile + 1);
      multiply_scores<Policy>(output, scores, slot(shared, 2 * tile + 1), shared + kScoresBegin, thread);
      next_tile(cursor, state);
    }
    Policy::template wait<0>();
    __syncthreads();  // the query tile becomes the output's

    TokenView lse_view = output_view<float>(params, params.lse, own);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = reduce_row<Policy::kRowLanes>(sum[r], Sum{});
      float const inverse = sum[r] == 0 ? 0.0f : 1 / sum[r];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(output_rows); ++c) output_rows(r, c) *= inverse;
      int const row = get<0>(coordinates(r, 0));
      int p[kMaxRank];
      bool present = get<1>(coordinates(r, 0)) == 0;  // one lane writes for its row
      for (int a = 0; a < kMaxRank; ++a) {
        p[a] = own.origin[a] + own.tokens.shape.at(row, a);
        present = present && p[a] < own.tokens.box[a].end;
      }
      if (present) {
        *lse_view.token<float>(p[0], p[1], p[2]) =
            sum[r] == 0 ? -INFINITY : kLn2 * (maximum[r] * params.softmax_scale + log2f(sum[r]));
      }
    }
    store_accumulator<Policy>(output, shared, output_view<Element>(params, params.output, own), own,
                              problem.head_dim_value, params.output_vectors, thread);
  }

  CUTE_DEVICE static char* slot(char* shared, int step) {
    return shared + kRingBegin + step % kStages * StreamedTile::kBytes;
  }

  CUTE_DEVICE static Cursor first_tile(State const& state) {
    Cursor cursor;
    cursor.enter(state.walks[0]);
    if (cursor.left == 0) cursor.enter(state.walks[1]);
    return cursor;
  }
  CUTE_DEVICE static void next_tile(Cursor& cursor, State const& state) {
    cursor.advance(state.walks[cursor.lap]);
    if (cursor.left == 0 && cursor.lap == 0) cursor.enter(state.walks[1]);
  }

  template <class T>
  CUTE_DEVICE static TokenView output_view(Params const& params, TensorRef const& tensor, Own const& own) {
    int dilation[kMaxRank], origin[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      dilation[a] = params.problem.axes[a].dilation;
      origin[a] = params.problem.axes[a].query_origin;
    }
    return view_of<T>(tensor, own.batch, own.head, own.group, dilation, origin);
  }

  // Keys that boundary "zeros" counts beyond the grid, for the query of this row.
  CUTE_DEVICE static float missing_keys(Problem const& problem, State const& state, int row) {
    float counted = 1, there = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      int const p = state.own.origin[a] + state.own.tokens.shape.at(row, a);
      if (p >= state.own.tokens.box[a].end) return 0;
      Group const group = problem.axes[a].group(state.own.group[a]);
      counted *= float(group.counted(p));
      there *= float(group.window(p).size());
    }
    return counted - there;
  }
};

template <class Policy, class Launch>
void run_fna_forward(ForwardArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Kernel = FnaForward<Policy>;
  auto const params = Kernel::make_params(arguments, context);
  launch(Kernel{}, params, params.partition.blocks(), Kernel::kSharedBytes);
}

}  // namespace natten::cuda
