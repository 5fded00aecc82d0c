// SPDX-License-Identifier: MIT
// Kernels in which a warp works on one row at a time, its lanes on the columns: any head dim, any alignment.
#pragma once

#include <cute/tensor.hpp>

#include <algorithm>
#include <cstdint>

#include "natten/cuda/library.hpp"

namespace natten::cuda {

using namespace cute;

// What elements are summed in; also the type of LSE, delta and the bias table.
template <class Element>
using Accumulator = conditional_t<is_same_v<Element, double>, double, float>;

// a * b, rounded: part of no fused multiply-add. What a logit is must not depend on what is subtracted from it: the
// largest minus itself would be the error of its rounding, which is large where the logit is.
CUTE_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
CUTE_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

struct Warps {
  static constexpr int kLanes = 32;
  static constexpr int kPerBlock = 4;
  static constexpr int kThreads = kLanes * kPerBlock;

  static std::int64_t blocks(std::int64_t rows, LaunchContext const& context) {
    return std::min((rows + kPerBlock - 1) / kPerBlock, context.max_blocks);
  }

  CUTE_DEVICE static int lane() { return static_cast<int>(threadIdx.x % kLanes); }

  // body(row), for the rows of the calling warp.
  template <class Body>
  CUTE_DEVICE static void for_each_row(std::int64_t rows, Body const& body) {
    std::int64_t row = std::int64_t{blockIdx.x} * kPerBlock + threadIdx.x / kLanes;
    for (; row < rows; row += std::int64_t{gridDim.x} * kPerBlock) body(row);
  }

  template <class Element>
  CUTE_DEVICE static Accumulator<Element> dot(Element const* a, Element const* b, int size) {
    using Real = Accumulator<Element>;
    Real sum = 0;
    for (int i = lane(); i < size; i += kLanes) sum += static_cast<Real>(a[i]) * static_cast<Real>(b[i]);
    for (int bit = kLanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    return sum;
  }
};

// A sum of rows, in registers: as many columns of it as a warp takes at once.
template <class Element>
class ColumnSums {
 public:
  using Real = Accumulator<Element>;
  static constexpr int kPerLane = 8;
  static constexpr int kColumns = kPerLane * Warps::kLanes;

  // Columns [begin, begin + kColumns) of `size`.
  CUTE_DEVICE ColumnSums(int begin, int size) : first_(begin + Warps::lane()), size_(size) {}

  CUTE_DEVICE void add(Real weight, Element const* row) {
    for_each_column([&](Real& sum, int column) { sum += weight * static_cast<Real>(row[column]); });
  }
  CUTE_DEVICE void scale(Real factor) {
    for_each_column([&](Real& sum, int) { sum *= factor; });
  }
  CUTE_DEVICE void store(Element* row, Real factor) {
    for_each_column([&](Real& sum, int column) { row[column] = static_cast<Element>(sum * factor); });
  }

 private:
  template <class Visit>
  CUTE_DEVICE void for_each_column(Visit const& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      int const column = first_ + i * Warps::kLanes;
      if (column < size_) visit(sums_[i], column);
    }
  }

  int first_, size_;
  Real sums_[kPerLane] = {};
};

}  // namespace natten::cuda
