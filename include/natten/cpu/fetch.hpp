// SPDX-License-Identifier: MIT
// Lines that will be needed, asked for before they are. The rows of a head are a stride apart that hardware prefetchers give up on.
#pragma once

#include "natten/cpu/stream.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// A box of tokens of `dim` elements. Those that may be written are fetched to be owned.
struct Fetched {
  char const* origin = nullptr;  // null if there is nothing to fetch
  char const* next = nullptr;
  std::int64_t step[kMaxRank] = {0, 0, 0};
  int size[kMaxRank] = {0, 0, 0};
  int at[kMaxRank] = {0, 0, 0};
  int bytes = 0;
  bool is_written = false;

  Fetched() = default;
  template <class T>
  Fetched(GroupView<T> const& view, Interval const (&box)[kMaxRank], int dim) {
    if (view.bypasses_caches) return;
    if (box[0].empty() || box[1].empty() || box[2].empty() || dim == 0) return;
    for (int a = 0; a < kMaxRank; ++a) {
      step[a] = view.step[a] * static_cast<std::int64_t>(sizeof(T));
      size[a] = box[a].size();
    }
    origin = next = reinterpret_cast<char const*>(view.at(box[0].begin, box[1].begin, box[2].begin));
    bytes = dim * static_cast<int>(sizeof(T));
    is_written = !std::is_const<T>::value;
  }

  // Returns false behind the last token.
  bool advance() {
    next += step[2];
    if (++at[2] < size[2]) return true;
    at[2] = 0;
    if (++at[1] == size[1]) {
      at[1] = 0;
      if (++at[0] == size[0]) return false;
    }
    next = origin + at[0] * step[0] + at[1] * step[1];
    return true;
  }
};

// Fetches boxes a few lines at a time between products: more at once than a core can wait for stall what comes after them.
class FetchAhead {
 public:
  static constexpr int kMaxBoxes = 4;

  // Forgets what was to be fetched.
  template <class... Boxes>
  void start(Boxes const&... boxes) {
    static_assert(sizeof...(Boxes) <= kMaxBoxes, "the queue has no room for so many boxes");
    first_ = end_ = 0;
    (add(boxes), ...);
  }

  NATTEN_INLINE void some() {
    if (first_ < end_) fetch(kLines);
  }
  void all() {
    while (first_ < end_) fetch(kLines);
  }

 private:
  static constexpr int kLines = 16;

  void add(Fetched const& box) {
    if (box.origin != nullptr) queue_[end_++] = box;
  }

  void fetch(int lines) {
    while (lines > 0 && first_ < end_) {
      Fetched& tokens = queue_[first_];
      for (int i = 0; i < tokens.bytes; i += kLineBytes, --lines) {
        if (tokens.is_written) __builtin_prefetch(tokens.next + i, 1);
        else __builtin_prefetch(tokens.next + i, 0);
      }
      if (!tokens.advance()) ++first_;
    }
  }

  Fetched queue_[kMaxBoxes];
  int first_ = 0;
  int end_ = 0;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
