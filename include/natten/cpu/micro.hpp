// SPDX-License-Identifier: MIT
// The two inner loops that nearly all of the time is spent in. Queries (or keys) of the tile are lanes; the other side
// of the attention is streamed from a packed box.
#pragma once

#include <utility>

#include "natten/cpu/math.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// A packed operand: token t's words [64 p, 64 p + 64) are at data + p * plane_stride + t * pitch. The pitch is one of
// two constants so that all tokens of a run are displacements from one address; planes keep it small for any head_dim.
constexpr int kPlaneWords = 64;

struct Operand {
  Word* data = nullptr;
  int words = 0;
  int pitch = kPlaneWords;
  std::int64_t plane_stride = 0;

  Operand() = default;
  Operand(Word* data_, int words_, int tokens)
      : data(data_),
        words(words_),
        pitch(words <= kPlaneWords / 2 ? kPlaneWords / 2 : kPlaneWords),
        plane_stride(std::int64_t{tokens} * pitch) {}
};

// Memory for one token of an operand.
inline std::int64_t operand_words(int words) {
  return words <= kPlaneWords / 2 ? kPlaneWords / 2 : std::int64_t{ceil_div(words, kPlaneWords)} * kPlaneWords;
}

// A packed operand whose tokens slide past the lanes: of each row of tokens, word by word, the tokens side by side. Long rows are
// cut into blocks, so that the words of neighbours stay near each other; as blocks overlap, kSlideReach tokens from any on
// are in one block.
constexpr int kSlideReach = 32;
constexpr int kSlideBlock = 128;

struct SlidingOperand {
  Word* data = nullptr;
  int words = 0;
  int pitch = 0;  // from a token's word to its next
  int blocks = 0;

  SlidingOperand() = default;
  SlidingOperand(Word* data_, int words_, int width)
      : data(data_), words(words_), pitch(round_up(width, kLanes)), blocks(1) {
    if (pitch <= kSlideBlock + kSlideReach) return;
    pitch = kSlideBlock + kSlideReach;
    blocks = ceil_div(width, kSlideBlock);
  }
  std::int64_t row_words() const { return std::int64_t{blocks} * words * pitch; }
  // What is read beyond the last row: its value does not matter.
  static constexpr int kSlack = kSlideReach;

  // A word of token x of a row.
  NATTEN_INLINE Word* at(int row, int x, int word) const {
    int const block = blocks == 1 ? 0 : x / kSlideBlock;
    return data + row * row_words() + (std::int64_t{block} * words + word) * pitch + (x - block * kSlideBlock);
  }
};

// Tokens a run of dot products holds in registers, times two: with one vector of the lane side and, before AVX-512, one
// for the broadcast, 24 of 32 or 12 of 16 registers accumulate. 20 and more reach 95 % of FMA peak, 10 reach 90 %.
constexpr int kMaxRun = kRegisters == 32 ? 12 : 6;

// out_a[i] = sum over words of lanes[word] * a[token i][word], i < N, and the same for b.
template <class Math, int kPitch, int N>
void dot_run(Vec const* lanes, int words, Word const* a, Word const* b, std::int64_t plane_stride, Vec* out_a,
             Vec* out_b) {
  Vec sum_a[N] = {};
  Vec sum_b[N] = {};
  for (int left = words; left > 0; left -= kPlaneWords) {
    int const n = left < kPlaneWords ? left : kPlaneWords;
    for (int w = 0; w < n; ++w) {
      Vec const x = lanes[w];
#pragma GCC unroll 12
      for (int i = 0; i < N; ++i) {
        sum_a[i] = Math::multiply_add(sum_a[i], x, a + i * kPitch + w);
        sum_b[i] = Math::multiply_add(sum_b[i], x, b + i * kPitch + w);
      }
    }
    lanes += kPlaneWords;
    a += plane_stride;
    b += plane_stride;
  }
#pragma GCC unroll 12
  for (int i = 0; i < N; ++i) {
    out_a[i] = sum_a[i];
    out_b[i] = sum_b[i];
  }
}

// The run length is only known at run time: a table of its instantiations.
template <class Math, int kPitch>
struct DotRuns {
  using Run = void (*)(Vec const*, int, Word const*, Word const*, std::int64_t, Vec*, Vec*);
  template <int... I>
  struct Table {
    static constexpr Run kRuns[] = {dot_run<Math, kPitch, I + 1>...};
  };
  template <int... I>
  static constexpr Run const* table(std::integer_sequence<int, I...>) {
    return Table<I...>::kRuns;
  }
  static Run of_length(int n) { return table(std::make_integer_sequence<int, kMaxRun>{})[n - 1]; }
};

// Dot products of the lane side with `rows` rows of `width` tokens; row r starts at token row_token[r] of the operand, its
// results at out[r * width].
template <class Math, int kPitch>
void dot_rows_of_pitch(Vec const* lanes, Operand const& operand, int const* row_token, int rows, int width, Vec* out) {
  using Runs = DotRuns<Math, kPitch>;
  auto const at = [&](int r, int x) { return operand.data + (row_token[r] + x) * std::int64_t{kPitch}; };
  // Two rows side by side, in runs of nearly equal length: 31 tokens are 11 + 10 + 10.
  int const pieces = ceil_div(width, kMaxRun);
  int r = 0;
  for (; r + 2 <= rows; r += 2) {
    for (int i = 0; i < pieces; ++i) {
      int const x = i * width / pieces;
      Runs::of_length((i + 1) * width / pieces - x)(lanes, operand.words, at(r, x), at(r + 1, x), operand.plane_stride,
                                                    out + r * width + x, out + (r + 1) * width + x);
    }
  }
  // A row alone with itself: runs of equal, even length, of which the last may overlap the one before it by a token.
  int const runs = ceil_div(width, 2 * kMaxRun);
  int const half = ceil_div(ceil_div(width, runs), 2);
  typename Runs::Run const run = Runs::of_length(half);
  for (; r < rows; ++r) {
    for (int i = 0; i < runs; ++i) {
      int const a = max(0, min(i * 2 * half, width - 2 * half));
      int const b = min(a + half, width - half);
      run(lanes, operand.words, at(r, a), at(r, b), operand.plane_stride, out + r * width + a, out + r * width + b);
    }
  }
}

template <class Math>
void dot_rows(Vec const* lanes, Operand const& operand, int const* row_token, int rows, int width, Vec* out) {
  if (operand.pitch == kPlaneWords) {
    dot_rows_of_pitch<Math, kPlaneWords>(lanes, operand, row_token, rows, width, out);
  } else {
    dot_rows_of_pitch<Math, kPlaneWords / 2>(lanes, operand, row_token, rows, width, out);
  }
}

// A row of words of a sum operand, and of weights for them.
struct WeightedRow {
  Word const* values;
  Word const* weights;
};

// Where the weights of a row are: of member g of a group for word w at weights[member[g] + w * kLanes] ...
struct WeightsOfLanes {
  int const* member;

  template <int G>
  struct Row {
    Word const* first[G];
    NATTEN_INLINE Word const* at(int g, int w) const { return first[g] + w * kLanes; }
  };
  template <int G>
  NATTEN_INLINE Row<G> row(Word const* weights) const {
    Row<G> row;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) row.first[g] = weights + member[g];
    return row;
  }
};

// ... or, where lanes are the words and streamed tokens the members, at weights[word[w] + g * kLanes].
struct WeightsOfTokens {
  int const* word;

  template <int G>
  struct Row {
    Word const* first;
    int const* word;
    NATTEN_INLINE Word const* at(int g, int w) const { return first + word[w] + g * kLanes; }
  };
  template <int G>
  NATTEN_INLINE Row<G> row(Word const* weights) const {
    return {weights, word};
  }
};

// out[g][c] += sum over rows and `words` of each of weight[g][word] * value[word][c], for G members of a group and C vectors
// of channels, which start `channel` words behind a word's first.
template <class Math, int G, int C, class Weights>
void accumulate(WeightedRow const* rows, int num_rows, Interval words, Weights where, std::int64_t pitch,
                std::int64_t channel, float* out, std::int64_t out_stride) {
  // 16 accumulators, in several sets if need be: 8 just cover the latency of an FMA (4 cycles, 2 a cycle), and any
  // hiccup costs (6 % at 2 x 4).
  constexpr int kAccumulators = kRegisters == 32 ? 16 : 8;
  constexpr int kSets = G * C >= kAccumulators ? 1 : 2 * G * C >= kAccumulators ? 2 : 4;
  Vec sum[kSets][G][C] = {};
  auto const add = [&](Word const* values, auto const& weights, int w, auto set) __attribute__((always_inline)) {
    Vec v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      v[c] = load_as<Vec>(values + c * kLanes);
      keep_in_register(v[c]);  // else it is loaded again for every g: 10 loads for 8 FMAs instead of 6
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        sum[set][g][c] = Math::multiply_add(sum[set][g][c], v[c], weights.at(g, w));
      }
    }
  };
  std::int64_t const first_value = words.begin * pitch + channel;
  for (int r = 0; r < num_rows; ++r) {
    Word const* values = rows[r].values + first_value;
    auto const weights = where.template row<G>(rows[r].weights);
    int w = words.begin;
    if constexpr (kSets > 1) {
      for (; w + kSets <= words.end; w += kSets) {
        add(values, weights, w, std::integral_constant<int, 0>{});
        add(values + pitch, weights, w + 1, std::integral_constant<int, 1>{});
        if constexpr (kSets > 2) {
          add(values + 2 * pitch, weights, w + 2, std::integral_constant<int, 2 % kSets>{});
          add(values + 3 * pitch, weights, w + 3, std::integral_constant<int, 3 % kSets>{});
        }
        values += kSets * pitch;
      }
    }
    for (; w < words.end; ++w, values += pitch) add(values, weights, w, std::integral_constant<int, 0>{});
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec total = sum[0][g][c];
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) total += sum[s][g][c];
      float* const to = out + g * out_stride + c * kLanes;
      store_vec(to, load_vec(to) + total);
    }
  }
}

// The same for any number of channels.
template <class Math, int G, class Weights>
void accumulate_channels(WeightedRow const* rows, int num_rows, Interval words, Weights where, Operand const& values,
                         int channels, float* out, std::int64_t out_stride) {
  for (int c = 0; c < channels; c += 4 * kLanes) {
    std::int64_t const channel = c / kPlaneWords * values.plane_stride + c % kPlaneWords;
    auto const run = [&](auto vectors) {
      accumulate<Math, G, decltype(vectors)::value>(rows, num_rows, words, where, values.pitch, channel, out + c,
                                                    out_stride);
    };
    int const vectors = min(4, ceil_div(channels - c, kLanes));
    if (vectors == 4) run(std::integral_constant<int, 4>{});
    else if (vectors == 3) run(std::integral_constant<int, 3>{});
    else if (vectors == 2) run(std::integral_constant<int, 2>{});
    else run(std::integral_constant<int, 1>{});
  }
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
