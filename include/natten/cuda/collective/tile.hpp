// SPDX-License-Identifier: MIT
// Tiles of tokens: boxes of a dilation group, and how they lie in shared memory.
#pragma once

#include <cute/tensor.hpp>

#include "natten/arguments.hpp"

namespace natten::cuda {

using namespace cute;

// The sides of a box of tokens, all powers of two. Token r of the box lies at (r >> shift[0], ..., r & (side[2] - 1)).
struct TileShape {
  int side[kMaxRank] = {1, 1, 1};
  int shift[kMaxRank] = {0, 0, 0};
  std::uint64_t repeat[kMaxRank] = {1, 1, 1};  // a bit wherever the axis starts again, among the first 64 tokens

  static TileShape make(int const (&sides)[kMaxRank]) {
    TileShape shape;
    for (int a = kMaxRank - 1, shift = 0; a >= 0; --a) {
      shape.side[a] = sides[a];
      shape.shift[a] = shift;
      while ((sides[a] >> 1) >> (shift - shape.shift[a])) ++shift;
      shape.repeat[a] = 0;
      for (int bit = 0; bit < 64; bit += 1 << shift) shape.repeat[a] |= std::uint64_t{1} << bit;
    }
    return shape;
  }

  CUTE_HOST_DEVICE int tokens() const { return side[0] * side[1] * side[2]; }
  CUTE_HOST_DEVICE int at(int token, int axis) const { return (token >> shift[axis]) & (side[axis] - 1); }
};

// The tokens of a tensor that belong to one dilation group, of one head of one sample. Strides in elements.
struct TokenView {
  char const* data = nullptr;
  std::int64_t stride[kMaxRank] = {0, 0, 0};  // from one position of the group to the next

  template <class T>
  CUTE_DEVICE TokenView moved(std::int64_t elements) const {
    TokenView view = *this;
    view.data += elements * static_cast<std::int64_t>(sizeof(T));
    return view;
  }
  template <class T>
  CUTE_DEVICE T* token(int p0, int p1, int p2) const {
    return reinterpret_cast<T*>(const_cast<char*>(data)) + (p0 * stride[0] + p1 * stride[1] + p2 * stride[2]);
  }
};

// `origin`: the token of the grid that is the tensor's first.
template <class T>
CUTE_DEVICE TokenView view_of(TensorRef const& tensor, std::int64_t batch, int head, int const (&group)[kMaxRank],
                              int const (&dilation)[kMaxRank], int const (&origin)[kMaxRank]) {
  TokenView view;
  std::int64_t offset = batch * tensor.stride_batch + head * tensor.stride_head;
  for (int a = 0; a < kMaxRank; ++a) {
    offset += (group[a] - origin[a]) * tensor.stride_axis[a];
    view.stride[a] = dilation[a] * tensor.stride_axis[a];
  }
  view.data = static_cast<char const*>(tensor.data) + offset * static_cast<std::int64_t>(sizeof(T));
  return view;
}

constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// A row of a tile is cut into vectors of 16 bytes; within lines of up to 128 bytes they are permuted by the row, so that
// eight rows read at one column touch all 32 banks.
template <class Element, int kRows, int kColumns>
struct SharedTile {
  static constexpr int kVector = 16 / int(sizeof(Element));
  static constexpr int kPowerOfTwo = kColumns & -kColumns;  // that divides a row
  static constexpr int kLine = kPowerOfTwo < 8 * kVector ? kPowerOfTwo : 8 * kVector;
  using Atom = decltype(composition(Swizzle<log2_of(kLine / kVector), log2_of(kVector), 3>{},
                                    Layout<Shape<_8, Int<kLine>>, Stride<Int<kLine>, _1>>{}));
  using Layout_ = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kColumns>>{}));
  static constexpr int kBytes = kRows * kColumns * int(sizeof(Element));

  // (row, column).
  CUTE_DEVICE static auto tensor(char* shared) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared)), Layout_{});
  }

  // (column, row), its rows in the order that `RowOrder` lists them.
  template <class RowOrder>
  CUTE_DEVICE static auto transposed(char* shared, RowOrder) {
    auto const columns = Layout<Int<kColumns>, Int<kRows>>{};
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(shared)),
                       composition(Layout_{}, make_layout(columns, RowOrder{})));
  }
};

// Whether all tokens of a tensor start at a multiple of 16 bytes, and hold a whole number of such vectors.
template <class Element>
bool in_vectors(TensorRef const& tensor, int head_dim) {
  constexpr int kVector = 16 / int(sizeof(Element));
  bool aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0 && head_dim % kVector == 0;
  for (std::int64_t stride :
       {tensor.stride_batch, tensor.stride_head, tensor.stride_axis[0], tensor.stride_axis[1], tensor.stride_axis[2]}) {
    aligned = aligned && stride % kVector == 0;
  }
  return aligned;
}

}  // namespace natten::cuda
