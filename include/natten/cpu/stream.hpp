// SPDX-License-Identifier: MIT
// Reading tokens: boxes of a tensor packed as operands for the inner loops, and the tile's own tokens transposed into
// lanes. Packing pays: in place, the tokens of a head lie heads * head_dim apart, and their lines fall into a quarter of
// the L1 sets (10-25 % slower).
#pragma once

#include <type_traits>

#include "natten/arguments.hpp"
#include "natten/cpu/micro.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// One head of one batch entry of one dilation group of a tensor, addressed by position.
template <class T>
struct GroupView {
  T* base = nullptr;  // of position (0, 0, 0), which the tensor need not hold
  std::int64_t step[kMaxRank] = {0, 0, 0};

  GroupView() = default;
  // `origin`: the grid's token that is the tensor's first, per axis.
  GroupView(TensorRef const& tensor, Group const (&groups)[kMaxRank], int const (&origin)[kMaxRank],
            std::int64_t batch, int head) {
    std::int64_t offset = batch * tensor.stride_batch + head * tensor.stride_head;
    for (int a = 0; a < kMaxRank; ++a) {
      offset += (groups[a].index - origin[a]) * tensor.stride_axis[a];
      step[a] = groups[a].dilation * tensor.stride_axis[a];
    }
    base = static_cast<T*>(tensor.data) + offset;
  }
  NATTEN_INLINE T* at(int z, int y, int x) const { return base + z * step[0] + y * step[1] + x * step[2]; }
};

// A box of positions of the stream side. Rows are runs along the last axis, padded to a whole number of words.
struct StreamBox {
  Interval axis[kMaxRank];
  int pitch = 0;  // tokens from one row to the next

  StreamBox() = default;
  StreamBox(Interval z, Interval y, Interval x, int tokens_per_word) : axis{z, y, x}, pitch(round_up(x.size(), tokens_per_word)) {}

  int rows() const { return axis[0].size() * axis[1].size(); }
  int tokens() const { return rows() * pitch; }
  // Packed index of a token.
  NATTEN_INLINE int token(int z, int y, int x) const {
    return ((z - axis[0].begin) * axis[1].size() + (y - axis[1].begin)) * pitch + (x - axis[2].begin);
  }
};

// The shape of an operand of `tokens` tokens with `words` words each, at `data`.
inline Operand make_operand(Word* data, int words, int tokens) {
  Operand operand;
  operand.data = data;
  operand.words = words;
  operand.pitch = words <= kPlaneWords / 2 ? kPlaneWords / 2 : kPlaneWords;
  operand.plane_stride = std::int64_t{tokens} * operand.pitch;
  return operand;
}

inline std::int64_t operand_words(int words, int tokens) {
  Operand const operand = make_operand(nullptr, words, tokens);
  return ceil_div(words, kPlaneWords) * operand.plane_stride;
}

NATTEN_INLINE Word* word_at(Operand const& operand, int token, int word) {
  return operand.data + (word / kPlaneWords) * operand.plane_stride + std::int64_t{token} * operand.pitch +
         word % kPlaneWords;
}

NATTEN_INLINE bool any(IntVec mask) {
  std::int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= mask[i];
  return all != 0;
}

// Rows of a head are a stride apart that hardware prefetchers give up on: ask for the lines of a token some tokens ahead.
// A line that may be written is fetched to be owned.
template <class T>
NATTEN_INLINE void prefetch_token(T* row, int dim) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  for (int i = 0; i < dim; i += kLine) __builtin_prefetch(row + i, /*rw=*/!std::is_const<T>::value);
}

constexpr int kPrefetchTokens = 8;

// Packs a box as dot operand. Returns whether an element is infinite or NaN.
template <class Math>
bool pack_dot(GroupView<typename Math::Storage const> const& from, StreamBox const& box, int dim, Operand const& to) {
  IntVec nonfinite = {};
  int const size = box.axis[2].size();
  for (int z = box.axis[0].begin; z < box.axis[0].end; ++z) {
    for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
      auto const* row = from.at(z, y, box.axis[2].begin);
      Word* out = word_at(to, box.token(z, y, box.axis[2].begin), 0);
      for (int i = 0; i < size; ++i, row += from.step[2], out += to.pitch) {
        if (i + kPrefetchTokens < size) prefetch_token(row + kPrefetchTokens * from.step[2], dim);
        for (int plane = 0; plane * kPlaneWords < to.words; ++plane) {
          int const end = min(to.words, (plane + 1) * kPlaneWords);
          Word* plane_out = out + plane * to.plane_stride;
          for (int w = plane * kPlaneWords; w < end; w += kLanes, plane_out += kLanes) {
            Vec const v = Math::load_words(row, w, dim);
            nonfinite |= Math::is_nonfinite(v);
            store_as(plane_out, v);
          }
        }
      }
      for (int i = size; i < box.pitch; ++i) {
        for (int w = 0; w < to.words; w += kLanes) store_as(word_at(to, box.token(z, y, box.axis[2].begin + i), w), Vec{});
      }
    }
  }
  return any(nonfinite);
}

// Packs a box as sum operand, where that differs from a dot operand: a word holds one channel of two tokens.
template <class Math>
bool pack_sum(GroupView<typename Math::Storage const> const& from, StreamBox const& box, int dim, Operand const& to) {
  typename Math::Storage const zeros[kLanes] = {};
  IntVec nonfinite = {};
  for (int z = box.axis[0].begin; z < box.axis[0].end; ++z) {
    for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
      int pair = box.token(z, y, box.axis[2].begin) / 2;
      auto const* row = from.at(z, y, box.axis[2].begin);
      for (int i = 0; i < box.pitch; i += 2, ++pair, row += 2 * from.step[2]) {
        bool const has_odd = i + 1 < box.axis[2].size();
        for (int c = 0; c < dim; c += kLanes) {
          int const n = min(dim - c, kLanes);
          Vec const v = Math::interleave(row + c, has_odd ? row + from.step[2] + c : zeros, n);
          nonfinite |= Math::is_nonfinite(v);
          store_as(word_at(to, pair, c), v);
        }
      }
    }
  }
  return any(nonfinite);
}

// The stream side of one product pair (K and V, or Q and dO), packed: as dot operand, and as sum operand.
template <class Math>
struct PackedTensor {
  Operand dot;
  Operand sum;
  int dim = 0;

  static std::int64_t words(int dim, int tokens) {
    std::int64_t dot = operand_words(ceil_div(dim, Math::kPerWord), tokens);
    return Math::kPerWord == 1 ? dot : dot + operand_words(dim, tokens / Math::kPerWord);
  }

  PackedTensor(Word* data, int dim_, int tokens) : dim(dim_) {
    dot = make_operand(data, ceil_div(dim, Math::kPerWord), tokens);
    sum = Math::kPerWord == 1
              ? dot
              : make_operand(data + operand_words(dot.words, tokens), dim, tokens / Math::kPerWord);
  }

  bool pack(GroupView<typename Math::Storage const> const& from, StreamBox const& box, bool as_dot, bool as_sum) const {
    bool nonfinite = false;
    if (as_dot || Math::kPerWord == 1) {
      nonfinite = pack_dot<Math>(from, box, dim, dot);
    }
    if constexpr (Math::kPerWord > 1) {
      if (as_sum) nonfinite |= pack_sum<Math>(from, box, dim, sum);
    }
    return nonfinite;
  }
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
