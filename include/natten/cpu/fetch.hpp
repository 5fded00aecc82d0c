// SPDX-License-Identifier: MIT
// Lines that will be needed, asked for before they are. The rows of a head are a stride apart that hardware prefetchers give up on.
#pragma once

#include "natten/cpu/stream.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Boxes of tokens, a few lines at a time between products: more at once than a core can wait for stall what comes after them.
class FetchAhead {
 public:
  void start() { first_ = end_ = 0; }

  // Tokens of `dim` elements. Those that may be written are fetched to be owned.
  template <class T>
  void add(GroupView<T> const& view, Interval const (&box)[kMaxRank], int dim) {
    if (view.bypasses_caches) return;
    if (box[0].empty() || box[1].empty() || box[2].empty() || dim == 0) return;
    Tokens& tokens = queue_[end_++];
    for (int a = 0; a < kMaxRank; ++a) {
      tokens.step[a] = view.step[a] * static_cast<std::int64_t>(sizeof(T));
      tokens.size[a] = box[a].size();
      tokens.at[a] = 0;
    }
    tokens.origin = tokens.next = reinterpret_cast<char const*>(view.at(box[0].begin, box[1].begin, box[2].begin));
    tokens.bytes = dim * static_cast<int>(sizeof(T));
    tokens.is_written = !std::is_const<T>::value;
  }

  NATTEN_INLINE void some() {
    if (first_ < end_) fetch(kLines);
  }
  void all() {
    while (first_ < end_) fetch(kLines);
  }

 private:
  static constexpr int kLines = 16;

  struct Tokens {
    char const* origin;
    char const* next;
    std::int64_t step[kMaxRank];
    int size[kMaxRank];
    int at[kMaxRank];
    int bytes;
    bool is_written;

    // Returns false behind the last.
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

  void fetch(int lines) {
    while (lines > 0 && first_ < end_) {
      Tokens& tokens = queue_[first_];
      for (int i = 0; i < tokens.bytes; i += kLineBytes, --lines) {
        if (tokens.is_written) __builtin_prefetch(tokens.next + i, 1);
        else __builtin_prefetch(tokens.next + i, 0);
      }
      if (!tokens.advance()) ++first_;
    }
  }

  Tokens queue_[4];
  int first_ = 0;
  int end_ = 0;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
