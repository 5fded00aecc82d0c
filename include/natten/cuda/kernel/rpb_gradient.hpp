// SPDX-License-Identifier: MIT
// The gradient of the bias table from attention weights in memory (kRpbGradient): every thread sums one entry over the
// queries, whose slots of neighbouring entries are neighbours in memory. A block takes a part of the queries and has a
// table of its own; tables are added in their order, so the bits are the same in every run.
#pragma once

#include "natten/cuda/collective/bias_gradient.hpp"
#include "natten/cuda/collective/weights.hpp"

namespace natten::cuda {

template <class Element>
struct RpbGradient {
  using Real = Accumulator<Element>;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;

  struct Params {
    Problem problem;
    TensorRef weights;
    BiasIndex bias;
    SlotIndex slots;
    Real* tables;       // [parts, heads, entries]
    std::int64_t rows;  // queries of one head, of all samples
    std::int64_t items;
    int parts, chunks;  // of the queries; of the entries, a thread each
  };

  // A query: where its weights start, and from where to where its keys lie on each axis, seen from it.
  struct Row {
    std::int64_t offset;
    int begin[kMaxRank], end[kMaxRank];
  };
  static constexpr int kRows = kThreads;  // found at a time
  static constexpr int kSharedBytes = kRows * int(sizeof(Row));

  static Params make_params(UnfusedArguments const& a, LaunchContext const& context) {
    Params p{};
    p.problem = a.problem;
    p.weights = a.weights;
    p.bias = BiasIndex::make(a.problem);
    p.slots = SlotIndex::make(a.problem);
    p.tables = static_cast<Real*>(context.workspace);
    p.rows = a.problem.batch;
    for (Axis const& axis : a.problem.axes) p.rows *= axis.query_extent;
    p.chunks = ceil_div(p.bias.entries, kThreads);
    constexpr int kBlocks = 2048;  // fill any GPU several times
    std::int64_t const steps = (p.rows + kRows - 1) / kRows;
    std::int64_t const wanted = ceil_div(kBlocks, p.chunks * a.problem.heads);
    p.parts = static_cast<int>(std::max<std::int64_t>(1, std::min(steps, wanted)));
    p.items = std::int64_t{p.parts} * a.problem.heads * p.chunks;
    return p;
  }
  static std::int64_t workspace_bytes(Params const& p) {
    return std::int64_t{p.parts} * p.problem.heads * p.bias.entries * std::int64_t(sizeof(Real));
  }

  CUTE_DEVICE void operator()(Params const& p, char* shared) const {
    Row* const rows = reinterpret_cast<Row*>(shared);
    for (std::int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
      int const chunk = static_cast<int>(item % p.chunks);
      int const head = static_cast<int>(item / p.chunks % p.problem.heads);
      std::int64_t const part = item / p.chunks / p.problem.heads;
      int const entry = chunk * kThreads + static_cast<int>(threadIdx.x);
      int displacement[kMaxRank];
      for (int a = 0, rest = entry; a < kMaxRank; rest %= p.bias.stride[a], ++a) {
        displacement[a] = rest / p.bias.stride[a] - (p.problem.axes[a].kernel_size - 1);
      }
      Element const* const weights = static_cast<Element const*>(p.weights.data) + head * p.weights.stride_head +
                                     p.slots.of_position(displacement);
      std::int64_t const end = (part + 1) * p.rows / p.parts;
      Real sum = 0;
      for (std::int64_t first = part * p.rows / p.parts; first < end; first += kRows) {
        int const count = static_cast<int>(end - first < kRows ? end - first : kRows);
        __syncthreads();
        if (int(threadIdx.x) < count) rows[threadIdx.x] = find_row(p, first + threadIdx.x);
        __syncthreads();
        Real step = 0;  // sums of sums err less
        for (int i = 0; i < count; ++i) {
          Row const& row = rows[i];
          bool attended = true;
          for (int a = 0; a < kMaxRank; ++a) {
            attended = attended && displacement[a] >= row.begin[a] && displacement[a] < row.end[a];
          }
          if (attended) step += static_cast<Real>(weights[row.offset]);
        }
        sum += step;
      }
      if (entry < p.bias.entries) p.tables[(part * p.problem.heads + head) * p.bias.entries + entry] = sum;
    }
  }

 private:
  CUTE_DEVICE static Row find_row(Params const& p, std::int64_t index) {
    Row row;
    row.offset = 0;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      Axis const& axis = p.problem.axes[a];
      int const x = static_cast<int>(index % axis.query_extent);
      index /= axis.query_extent;
      int const token = axis.query_origin + x;
      int const position = token / axis.dilation;
      Interval const window = axis.group(token % axis.dilation).window(position);
      row.begin[a] = window.begin - position;
      row.end[a] = window.end - position;
      row.offset += x * p.weights.stride_axis[a] - std::int64_t{row.begin[a]} * p.slots.stride[a];
    }
    row.offset += index * p.weights.stride_batch;
    return row;
  }
};

template <class Element>
std::int64_t rpb_gradient_workspace(UnfusedArguments const& arguments, LaunchContext const& context) {
  return RpbGradient<Element>::workspace_bytes(RpbGradient<Element>::make_params(arguments, context));
}

template <class Element, class Launch>
void run_rpb_gradient(UnfusedArguments const& arguments, LaunchContext const& context, Launch&& launch) {
  using Kernel = RpbGradient<Element>;
  using Sum = SumBiasTables<typename Kernel::Real>;
  auto const params = Kernel::make_params(arguments, context);
  launch(Kernel{}, params, std::min(params.items, context.max_blocks), Kernel::kSharedBytes);
  std::int64_t const size = std::int64_t{arguments.problem.heads} * params.bias.entries;
  typename Sum::Params const sum{params.tables, static_cast<typename Kernel::Real*>(arguments.d_rpb), size,
                                 params.parts};
  launch(Sum{}, sum, Sum::blocks(size), 0);
}

}  // namespace natten::cuda
