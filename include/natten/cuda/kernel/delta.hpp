// SPDX-License-Identifier: MIT
// What the backward pass subtracts from every slope: delta = rowsum(d_output * output) - d_lse.
#pragma once

#include "natten/arguments.hpp"
#include "natten/cuda/collective/warp.hpp"

namespace natten::cuda {

// A warp a row: a query of one head of one sample.
template <class Element>
struct Delta {
  using Real = Accumulator<Element>;
  static constexpr int kThreads = Warps::kThreads;
  static constexpr int kMinBlocks = 1;

  struct Params {
    TensorRef output, d_output, d_lse;
    Real* delta;  // [batch, axis 0, axis 1, axis 2, heads]
    std::int64_t rows;
    int extent[kMaxRank];
    int heads, head_dim;
  };

  static std::int64_t blocks(Params const& p, LaunchContext const& context) { return Warps::blocks(p.rows, context); }

  CUTE_DEVICE void operator()(Params const& p, char*) const {
    Warps::for_each_row(p.rows, [&](std::int64_t row) {
      std::int64_t rest = row;
      int const head = static_cast<int>(rest % p.heads);
      rest /= p.heads;
      int x[kMaxRank];
      for (int a = kMaxRank - 1; a >= 0; --a) {
        x[a] = static_cast<int>(rest % p.extent[a]);
        rest /= p.extent[a];
      }
      auto const output = static_cast<Element const*>(p.output.data) + offset(p.output, rest, head, x);
      auto const d_output = static_cast<Element const*>(p.d_output.data) + offset(p.d_output, rest, head, x);
      Real delta = Warps::dot(output, d_output, p.head_dim);
      if (Warps::lane() != 0) return;
      if (p.d_lse.data != nullptr) delta -= static_cast<Real const*>(p.d_lse.data)[offset(p.d_lse, rest, head, x)];
      p.delta[row] = delta;
    });
  }

 private:
  CUTE_DEVICE static std::int64_t offset(TensorRef const& t, std::int64_t batch, int head, int const (&x)[kMaxRank]) {
    return batch * t.stride_batch + head * t.stride_head + x[0] * t.stride_axis[0] + x[1] * t.stride_axis[1] +
           x[2] * t.stride_axis[2];
  }
};

// Delta, for the kernels that read it.
inline TensorRef delta_tensor(Problem const& problem, void* data) {
  TensorRef delta;
  delta.data = data;
  delta.stride_head = 1;
  std::int64_t stride = problem.heads;
  for (int axis = kMaxRank - 1; axis >= 0; --axis) {
    delta.stride_axis[axis] = stride;
    stride *= problem.axes[axis].query_extent;
  }
  delta.stride_batch = stride;
  return delta;
}

template <class Element>
typename Delta<Element>::Params make_delta_params(BackwardArguments const& a, void* delta) {
  typename Delta<Element>::Params p{};
  p.output = a.output;
  p.d_output = a.d_output;
  p.d_lse = a.d_lse;
  p.delta = static_cast<typename Delta<Element>::Real*>(delta);
  p.heads = a.problem.heads;
  p.head_dim = a.problem.head_dim_value;
  p.rows = a.problem.batch * p.heads;
  for (int axis = 0; axis < kMaxRank; ++axis) {
    p.extent[axis] = a.problem.axes[axis].query_extent;
    p.rows *= p.extent[axis];
  }
  return p;
}

}  // namespace natten::cuda
