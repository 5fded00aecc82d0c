// SPDX-License-Identifier: MIT
// Reading tokens: boxes of a tensor packed as operands for the inner loops, and the tile's own tokens transposed into
// lanes. Packing pays: in place, the tokens of a head lie heads * head_dim apart, and their lines fall into a quarter of
// the L1 sets (10-25 % slower).
#pragma once

#include <type_traits>

#include "natten/arguments.hpp"
#include "natten/cpu/micro.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

constexpr int kLineBytes = 64;

// One head of one batch entry of one dilation group of a tensor, addressed by position.
template <class T>
struct GroupView {
  T* base = nullptr;  // of position (0, 0, 0), which the tensor need not hold
  std::int64_t step[kMaxRank] = {0, 0, 0};
  bool bypasses_caches = false;  // how tokens are stored

  GroupView() = default;
  // `origin`: the grid's token that is the tensor's first, per axis.
  GroupView(TensorRef const& tensor, Group const (&groups)[kMaxRank], int const (&origin)[kMaxRank], std::int64_t batch,
            int head) {
    std::int64_t offset = batch * tensor.stride_batch + head * tensor.stride_head;
    for (int a = 0; a < kMaxRank; ++a) {
      offset += (groups[a].index - origin[a]) * tensor.stride_axis[a];
      step[a] = groups[a].dilation * tensor.stride_axis[a];
    }
    base = static_cast<T*>(tensor.data) + offset;
  }
  NATTEN_INLINE T* at(int z, int y, int x) const { return base + z * step[0] + y * step[1] + x * step[2]; }
};

// A result larger than this for each thread has left their L2 caches, of 1 or 2 MB, before anyone reads it, and bypasses all caches.
// By hand, on a Zen 4, for results of 3.2 MB: 3 % less time forward and 10 % forward and backward with a window of 7 x 7, 7 and 14 %
// with 3 x 3; no less is gained if an addition that reads the result is counted. Results of 0.8 MB are read later than that, slower.
constexpr std::int64_t kCachedResultBytes = 1 << 20;

// A view of what a call computes: a tensor of `tokens` tokens in all heads and batch entries.
template <class T>
GroupView<T> as_result(GroupView<T> view, std::int64_t tokens, int dim, int num_threads) {
  std::int64_t const bytes = std::int64_t{dim} * static_cast<int>(sizeof(T));
  bool whole_lines = (reinterpret_cast<std::uintptr_t>(view.base) | bytes) % kLineBytes == 0;
  for (std::int64_t const step : view.step) {
    whole_lines = whole_lines && step * static_cast<int>(sizeof(T)) % kLineBytes == 0;
  }
  view.bypasses_caches = kCanStream && whole_lines && tokens * bytes > kCachedResultBytes * num_threads;
  return view;
}

// A packed box of positions of the stream side. Rows are runs along the last axis, padded at both ends to whole words. Slices
// along the first axis lie in a ring, so that a box can move along that axis and only what is new is packed.
struct StreamBox {
  Interval axis[kMaxRank];
  int first = 0;  // position of a row's first packed token; before axis[2].begin there is padding
  int pitch = 0;  // tokens from one row to the next
  int origin = 0;  // slice `origin` is the ring's first
  int ring = 1;  // slices

  StreamBox() = default;
  StreamBox(Interval const (&box)[kMaxRank], int tokens_per_word, int padding, int origin_, int ring_)
      : axis{box[0], box[1], box[2]},
        first(box[2].begin - padding),
        pitch(round_up(box[2].end - first, tokens_per_word)),
        origin(origin_),
        ring(ring_) {}

  int tokens() const { return ring * axis[1].size() * pitch; }
  // Packed index of a row, and of a token.
  NATTEN_INLINE int row(int z, int y) const { return (z - origin) % ring * axis[1].size() + (y - axis[1].begin); }
  NATTEN_INLINE int token(int z, int y, int x) const { return row(z, y) * pitch + (x - first); }
};

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
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  for (int i = 0; i < dim; i += kLine) __builtin_prefetch(row + i, /*rw=*/!std::is_const<T>::value);
}

// Stores wait for their lines one after the other: what is in the L2 cache by now is asked for some rows ahead of its store (a
// third of the time that a small window's output takes).
constexpr int kStoreAhead = 6;

// Asks for the lines of a token that will be stored.
template <class T>
NATTEN_INLINE void prefetch_store(GroupView<T> const& to, int z, int y, int x, int dim) {
  if (!to.bypasses_caches) prefetch_token(to.at(z, y, x), dim);
}

// Stores `dim` floats, times a factor.
template <class T>
NATTEN_INLINE void store_token(GroupView<T> const& to, int z, int y, int x, float const* from, float factor, int dim) {
  if (to.bypasses_caches) stream_row(to.at(z, y, x), from, factor, dim);
  else store_row(to.at(z, y, x), from, factor, dim);
}

constexpr int kPrefetchTokens = 8;

// Finds infinities and NaN among what it is shown: 0 times one of them is NaN. One instruction a vector, where a comparison of
// exponents takes four. `i` spreads vectors over sums, each of which waits for its last multiply-add.
template <class Math>
class NonfiniteSearch {
 public:
  NATTEN_INLINE void look_at(int i, Vec words) { sum_[i % kSums] = Math::multiply_add(sum_[i % kSums], words, Vec{}); }
  NATTEN_INLINE bool found() const { return any(sum_[0] + sum_[1] != 0.0f); }

 private:
  static constexpr int kSums = 2;
  Vec sum_[kSums] = {};
};

// Reading a box row by row. At the end of a row, what comes next are the first tokens of the row after it: without them, rows
// of 32 tokens would miss a quarter of their lines.
template <class T>
struct Prefetcher {
  GroupView<T> const& from;
  Interval const (&axis)[kMaxRank];
  Interval slices;
  int ahead = kPrefetchTokens;
  T* next = nullptr;  // the first token of the next row; null behind the last

  NATTEN_INLINE void start_row(int z, int y) {
    if (y + 1 < axis[1].end) next = from.at(z, y + 1, axis[2].begin);
    else if (z + 1 < slices.end) next = from.at(z + 1, axis[1].begin, axis[2].begin);
    else next = nullptr;
  }
  // `row`: token x of the row.
  NATTEN_INLINE void at(T* row, int x, int dim) const {
    int const beyond = x + ahead - axis[2].end;
    if (beyond < 0) prefetch_token(row + ahead * from.step[2], dim);
    else if (next != nullptr && beyond < axis[2].size()) prefetch_token(next + beyond * from.step[2], dim);
  }
};

// Packs slices of a box as dot operand. Returns whether an element is infinite or NaN.
template <class Math>
bool pack_dot(GroupView<typename Math::Storage const> const& from, StreamBox const& box, Interval slices, int dim,
              Operand const& to) {
  NonfiniteSearch<Math> nonfinite;
  Prefetcher<typename Math::Storage const> prefetcher{from, box.axis, slices};
  for (int z = slices.begin; z < slices.end; ++z) {
    for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
      prefetcher.start_row(z, y);
      auto const* row = from.at(z, y, box.first);
      Word* out = word_at(to, box.token(z, y, box.first), 0);
      for (int x = box.first; x < box.first + box.pitch; ++x, row += from.step[2], out += to.pitch) {
        prefetcher.at(row, x, dim);
        bool const is_token = box.axis[2].contains(x);
        // The commonest head dims without a branch: packing was a tenth of the time of small windows.
        auto const copy_whole = [&](auto words) {
#pragma GCC unroll 16
          for (int w = 0; w < decltype(words)::value; w += kLanes) {
            Vec const v = Math::load_words(row, w);
            nonfinite.look_at(w / kLanes, v);
            store_as(out + w, v);
          }
        };
        bool const is_whole = is_token && dim == to.words * Math::kPerWord;
        if (is_whole && to.words == kPlaneWords) {
          copy_whole(std::integral_constant<int, kPlaneWords>{});
          continue;
        }
        if (is_whole && to.words == kPlaneWords / 2) {
          copy_whole(std::integral_constant<int, kPlaneWords / 2>{});
          continue;
        }
        for (int plane = 0; plane * kPlaneWords < to.words; ++plane) {
          int const end = min(to.words, (plane + 1) * kPlaneWords);
          Word* plane_out = out + plane * to.plane_stride;
          for (int w = plane * kPlaneWords; w < end; w += kLanes, plane_out += kLanes) {
            Vec const v = is_token ? Math::load_words(row, w, dim) : Vec{};
            nonfinite.look_at(w / kLanes, v);
            store_as(plane_out, v);
          }
        }
      }
    }
  }
  return nonfinite.found();
}

// Packs slices of a box as sum operand, where that differs from a dot operand: a word holds one channel of two tokens.
template <class Math>
bool pack_sum(GroupView<typename Math::Storage const> const& from, StreamBox const& box, Interval slices, int dim,
              Operand const& to) {
  typename Math::Storage const zeros[kLanes] = {};
  NonfiniteSearch<Math> nonfinite;
  Prefetcher<typename Math::Storage const> prefetcher{from, box.axis, slices};
  for (int z = slices.begin; z < slices.end; ++z) {
    for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
      prefetcher.start_row(z, y);
      auto const* row = from.at(z, y, box.first);
      int pair = box.token(z, y, box.first) / 2;
      for (int x = box.first; x < box.first + box.pitch; x += 2, ++pair, row += 2 * from.step[2]) {
        bool const has_even = box.axis[2].contains(x), has_odd = box.axis[2].contains(x + 1);
        prefetcher.at(row, x, dim);
        prefetcher.at(row + from.step[2], x + 1, dim);
        for (int c = 0; c < dim; c += kLanes) {
          Vec const v = Math::interleave(has_even ? row + c : zeros, has_odd ? row + from.step[2] + c : zeros,
                                         min(dim - c, kLanes));
          nonfinite.look_at(c / kLanes, v);
          store_as(word_at(to, pair, c), v);
        }
      }
    }
  }
  return nonfinite.found();
}

// Tokens as lanes: store(word, vectors) for kLanes words at a time, those behind `dim` being 0. token_of(lane) is a pointer, which
// is null in some lanes unless there are `all`; they are 0.
template <class Math, class TokenOf, class Store>
NATTEN_INLINE void transpose_tokens(TokenOf const& token_of, bool all, int dim, Store const& store) {
  constexpr int kElements = kLanes * Math::kPerWord;
  for (int w = 0; w * Math::kPerWord < dim; w += kLanes) {
    int const element = w * Math::kPerWord;
    Vec rows[kLanes];
    if (all && element + kElements <= dim) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) rows[l] = Math::load_words(token_of(l) + element, 0);
    } else {
      for (int l = 0; l < kLanes; ++l) {
        auto const* const token = token_of(l);
        rows[l] = token != nullptr ? Math::load_words(token + element, 0, dim - element) : Vec{};
      }
    }
    transpose(rows);
    store(w, rows);
  }
}

// Packs slices of a box as sliding dot operand. Returns whether an element is infinite or NaN.
template <class Math>
bool pack_sliding(GroupView<typename Math::Storage const> const& from, StreamBox const& box, Interval slices, int dim,
                  SlidingOperand const& to) {
  using Storage = typename Math::Storage;
  NonfiniteSearch<Math> nonfinite;
  Prefetcher<Storage const> prefetcher{from, box.axis, slices, kLanes};
  int const width = box.axis[2].size();
  for (int z = slices.begin; z < slices.end; ++z) {
    for (int y = box.axis[1].begin; y < box.axis[1].end; ++y) {
      prefetcher.start_row(z, y);
      for (int x = 0; x < width; x += kLanes) {
        int const count = min(kLanes, width - x);
        Storage const* const first = from.at(z, y, box.axis[2].begin + x);
        for (int l = 0; l < count; ++l) prefetcher.at(first + l * from.step[2], box.axis[2].begin + x + l, dim);
        // Where blocks overlap, a token is in two of them.
        bool const is_twice = x >= kSlideBlock && x % kSlideBlock < kSlideReach && to.blocks > 1;
        Word* const out = to.at(box.row(z, y), x, 0);
        Word* const again = is_twice ? to.at(box.row(z, y), x - kSlideBlock, 0) + kSlideBlock : nullptr;
        auto const token_of = [&](int l) { return l < count ? first + l * from.step[2] : nullptr; };
        transpose_tokens<Math>(token_of, count == kLanes, dim, [&](int w, Vec const(&rows)[kLanes]) {
          int const n = min(kLanes, to.words - w);
          auto const store = [&](Word* to_words) {
            if (n == kLanes) {
#pragma GCC unroll 16
              for (int i = 0; i < kLanes; ++i, to_words += to.pitch) store_as(to_words, rows[i]);
            } else {
              for (int i = 0; i < n; ++i, to_words += to.pitch) store_as(to_words, rows[i]);
            }
          };
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) nonfinite.look_at(i, rows[i]);
          store(out + w * to.pitch);
          if (is_twice) store(again + w * to.pitch);
        });
      }
    }
  }
  return nonfinite.found();
}

// A tensor of the stream side, packed: as dot operand, and as sum operand.
template <class Math>
struct PackedTensor {
  Operand dot;
  Operand sum;
  SlidingOperand slide;  // instead of `dot`
  int dim = 0;

  // Memory for a token; none for a tensor that is not there, of dim 0.
  static std::int64_t token_words(int dim) {
    if (dim == 0) return 0;
    std::int64_t const dot = operand_words(ceil_div(dim, Math::kPerWord));
    return Math::kPerWord == 1 ? dot : dot + ceil_div(static_cast<int>(operand_words(dim)), Math::kPerWord);
  }

  PackedTensor() = default;
  PackedTensor(Word* data, int dim_, int tokens)
      : dot(data, ceil_div(dim_, Math::kPerWord), tokens),
        sum(Math::kPerWord == 1 ? dot
                                : Operand(data + operand_words(dot.words) * tokens, dim_, tokens / Math::kPerWord)),
        dim(dim_) {}

  // The same with a dot operand whose tokens slide: `rows` rows of `width`. The sum operand, of `tokens`, may be left out.
  static std::int64_t sliding_words(int dim, int rows, int width, std::int64_t tokens) {
    SlidingOperand const slide(nullptr, ceil_div(dim, Math::kPerWord), width);
    return slide.row_words() * rows + SlidingOperand::kSlack + operand_words(dim) * (tokens / Math::kPerWord);
  }
  static PackedTensor sliding(Word* data, int dim, int rows, int width, int tokens) {
    PackedTensor packed;
    packed.dim = dim;
    packed.slide = SlidingOperand(data, ceil_div(dim, Math::kPerWord), width);
    if (tokens > 0) packed.sum = Operand(data + sliding_words(dim, rows, width, 0), dim, tokens / Math::kPerWord);
    return packed;
  }

  // Returns whether an element is infinite or NaN.
  bool pack(GroupView<typename Math::Storage const> const& from, StreamBox const& box, Interval slices, bool as_dot,
            bool as_sum) const {
    bool nonfinite = false;
    if (dim == 0) return nonfinite;
    bool const slides = slide.data != nullptr;
    if (slides) nonfinite = pack_sliding<Math>(from, box, slices, dim, slide);
    if constexpr (Math::kPerWord == 1) {
      if (!slides || as_sum) nonfinite |= pack_dot<Math>(from, box, slices, dim, sum);
    } else {
      if (as_dot && !slides) nonfinite |= pack_dot<Math>(from, box, slices, dim, dot);
      if (as_sum) nonfinite |= pack_sum<Math>(from, box, slices, dim, sum);
    }
    return nonfinite;
  }
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
