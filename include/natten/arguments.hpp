// SPDX-License-Identifier: MIT
// What a kernel is called with. Shapes are those of the problem; every tensor's last dim is contiguous.
#pragma once

#include <cstdint>
#include <limits>

#include "natten/problem.hpp"

namespace natten {

// What a kernel computes. The unfused ones (from kQk on) are linear in each of their operands, and closed under
// differentiation: see UnfusedArguments.
enum class Op : int { kForward, kBackward, kQk, kAv, kAvTransposed, kRpbGradient };

// [batch, axis 0, axis 1, axis 2, heads, head_dim]; strides in elements. Additional keys and values and their
// gradients are [batch, token, heads_kv, head_dim], with the token as axis 2.
struct TensorRef {
  void* data = nullptr;
  std::int64_t stride_batch = 0;
  std::int64_t stride_axis[kMaxRank] = {0, 0, 0};
  std::int64_t stride_head = 0;

  explicit operator bool() const { return data != nullptr; }

  std::int64_t offset(std::int64_t batch, int head, int x0, int x1, int x2) const {
    return batch * stride_batch + head * stride_head + x0 * stride_axis[0] + x1 * stride_axis[1] + x2 * stride_axis[2];
  }
};

// LSE and its gradient have no head_dim: [batch, axis 0, axis 1, axis 2, heads], natural logarithm, float32 (float64 for
// float64 problems). The bias table is [heads, 2*K0-1, 2*K1-1, 2*K2-1], contiguous, of the same type as LSE.
//
// Weights that are computed from an LSE are off, relatively, by as much as rounding it has changed it: 3e-5 in float32 up to
// kCoarseLse, and beyond it backward computes the softmax again.
constexpr int kCoarseLse = 1024;

template <class Real>
NATTEN_INLINE constexpr bool is_coarse_lse(Real lse) {
  constexpr Real largest = std::numeric_limits<Real>::max();
  Real const magnitude = lse < 0 ? -lse : lse;
  return (magnitude > kCoarseLse) & (magnitude <= largest);
}

struct ForwardArguments {
  Problem problem;
  TensorRef query, key, value;
  TensorRef additional_keys, additional_values;  // null if problem.additional_keys == 0
  void const* rpb = nullptr;                     // null unless problem.has_rpb
  TensorRef output, lse;
  int num_threads = 1;
};

struct BackwardArguments {
  Problem problem;
  TensorRef query, key, value;
  TensorRef additional_keys, additional_values;
  void const* rpb = nullptr;
  TensorRef output, lse;
  TensorRef d_output;
  TensorRef d_lse;  // null: no gradient arrives through LSE
  TensorRef d_query, d_key, d_value;
  TensorRef d_additional_keys, d_additional_values;
  void* d_rpb = nullptr;  // same shape and type as rpb; null unless problem.has_rpb
  int num_threads = 1;
};

// Attention weights in memory: [batch, heads, axis 0, axis 1, axis 2, slots], where slot (t0, t1, t2) of a query, last
// axis fastest, is the key at window(query).begin + t on every axis; windows shorter than kernel_size leave slots without
// a key. With w(i, j) the weight of query i for key j, and heads and batch entries apart,
//   kQk             w(i, j) = query_i . key_j + rpb[j - i]; in slots without a key `unused`, but 0 in those that boundary
//                   "zeros" counts (t < Group::counted on every axis)
//   kAv             query_i = sum over j of w(i, j) key_j
//   kAvTransposed   key_j = sum over i, and the query heads of its head, of w(i, j) query_i
//   kRpbGradient    d_rpb[r] = sum over i and the batch of w(i, i + r)
// Of query, key and weights the one on the left is written, the others are read. Slots without a key are never read.
struct UnfusedArguments {
  Problem problem;  // head_dim is that of query and key; scale, head_dim_value and additional_keys say nothing
  TensorRef query, key;
  TensorRef weights;          // the last dim are the slots
  void const* rpb = nullptr;  // as above; null for none
  void* d_rpb = nullptr;      // of kRpbGradient
  double unused = 0;          // of kQk
  int num_threads = 1;
};

}  // namespace natten
