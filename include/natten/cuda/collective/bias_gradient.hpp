// SPDX-License-Identifier: MIT
// The gradient of the bias table, without atomics: a tile's gradients are laid down in shared memory, and every entry of
// the table that they touch is summed by one thread.
#pragma once

#include "natten/cuda/collective/block.hpp"

namespace natten::cuda {

template <int kOwn, int kStreamed, int kThreads>
struct BiasGradient {
  static constexpr int kPitch = kStreamed + 1;  // an odd pitch: diagonals meet all banks
  static constexpr int kBytes = kOwn * kPitch * int(sizeof(float));

  // Adds the elements of d_scores (rows, columns) to `table`, the block's own. Queries are owned, keys streamed. All
  // threads call it, once a tile of stream_tiles, whose barriers keep the
  // calls apart; `holds_scores`: this one's are not another's too.
  template <class Scores, class Coordinates, class State>
  CUTE_DEVICE static void add(Scores const& d_scores, Coordinates const& coordinates, State const& state,
                              int const (&origin)[kMaxRank], Problem const& problem, BiasIndex const& bias,
                              char* shared, float* table, bool holds_scores, int thread) {
    float* const tile = reinterpret_cast<float*>(shared);
    CUTE_UNROLL
    for (int r = 0; r < size<0>(d_scores); ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(d_scores); ++c) {
        if (holds_scores) tile[get<0>(coordinates(r, c)) * kPitch + get<1>(coordinates(r, c))] = d_scores(r, c);
      }
    }
    __syncthreads();
    TileShape const& queries = state.own.tokens.shape;
    TileShape const& keys = state.walks[0].tokens.shape;
    int spans[kMaxRank];  // displacements from a query to a key, on each axis
    for (int a = 0; a < kMaxRank; ++a) spans[a] = queries.side[a] + keys.side[a] - 1;
    for (int i = thread; i < spans[0] * spans[1] * spans[2]; i += kThreads) {
      int const place[kMaxRank] = {i / (spans[1] * spans[2]), i / spans[2] % spans[1], i % spans[2]};
      int shift[kMaxRank];  // of the key's place in its tile against the query's
      int entry = 0;
      bool exists = true;
      for (int a = 0; a < kMaxRank; ++a) {
        shift[a] = place[a] - (queries.side[a] - 1);
        int const row = origin[a] - state.own.origin[a] + shift[a] + problem.axes[a].kernel_size - 1;
        exists = exists && row >= 0 && row < 2 * problem.axes[a].kernel_size - 1;
        entry += row * bias.stride[a];
      }
      if (!exists) continue;
      float sum = 0;
      for (int q0 = max(0, -shift[0]); q0 < min(queries.side[0], keys.side[0] - shift[0]); ++q0) {
        for (int q1 = max(0, -shift[1]); q1 < min(queries.side[1], keys.side[1] - shift[1]); ++q1) {
          for (int q2 = max(0, -shift[2]); q2 < min(queries.side[2], keys.side[2] - shift[2]); ++q2) {
            int const row = (q0 << queries.shift[0]) + (q1 << queries.shift[1]) + q2;
            int const column = ((q0 + shift[0]) << keys.shift[0]) + ((q1 + shift[1]) << keys.shift[1]) + q2 + shift[2];
            sum += tile[row * kPitch + column];
          }
        }
      }
      table[entry] += sum;
    }
  }
};

// d_rpb [heads, entries] = sum over the blocks' tables [tables / heads, heads, entries], in their order.
template <class Real>
struct SumBiasTables {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  struct Params {
    Real const* tables;
    Real* sum;
    std::int64_t size;  // heads * entries
    std::int64_t parts;
  };

  static std::int64_t blocks(std::int64_t size) { return (size + kThreads - 1) / kThreads; }

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    std::int64_t const i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= p.size) return;
    Real sum = 0;
    for (std::int64_t part = 0; part < p.parts; ++part) sum += p.tables[part * p.size + i];
    p.sum[i] = sum;
  }
};

}  // namespace natten::cuda
