// SPDX-License-Identifier: MIT
// The two ways a fused kernel multiplies. A `Math` says what a 32-bit word of a packed operand holds, how words are
// made from the storage type, and how two words are multiplied and added:
//
//   Float32Math   one float a word; any storage type, converted while packing
//   BFloat16Math  two bfloat16 a word, vdpbf16ps: along head_dim in a dot product, along the keys in a weighted sum
//
// "Dot" operands are multiplied along head_dim (Q K^T, dO V^T); "sum" operands are rows weighted and added (P V, dS K).
#pragma once

#include "natten/cpu/simd.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

using Word = std::uint32_t;

template <class Storage_>
struct Float32Math {
  using Storage = Storage_;
  static constexpr int kPerWord = 1;  // elements in a word; if 1, a packed dot operand serves as sum operand too

  // Words [first, first + kLanes) of a row; of one that has `dim` elements, with zeros behind its end.
  NATTEN_INLINE static Vec load_words(Storage const* row, int first) { return load_vec(row + first); }
  NATTEN_INLINE static Vec load_words(Storage const* row, int first, int dim) {
    return first + kLanes <= dim ? load_words(row, first) : load_first(row + first, dim - first);
  }
  // Words of a sum operand: channels of one token; zero behind the first n.
  NATTEN_INLINE static Vec interleave(Storage const* row, Storage const*, int n) {
    return n >= kLanes ? load_vec(row) : load_first(row, n);
  }
  NATTEN_INLINE static Vec multiply_add(Vec sum, Vec a, Word const* b) { return sum + a * load_as<float>(b); }
  NATTEN_INLINE static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  // Weights [row][slot][lane], rows being `pitch` vectors, as the words that a weighted sum broadcasts: they are that already.
  // Returns the vectors from row to row.
  NATTEN_INLINE static int weights_to_words(Vec*, int, int, int pitch, IntVec) { return pitch; }
  // The same weights as words that a sum over lanes broadcasts.
  NATTEN_INLINE static Word const* weights_by_lane(Vec const* weights, int, Vec*) {
    return reinterpret_cast<Word const*>(weights);
  }
  // The same for weights [row][slot][lane] of which lane l's slots begin `from[l]` tokens behind those of lane 0, with zeros
  // around each row. Sets `pitch`, the vectors from row to row.
  NATTEN_INLINE static Word const* slots_by_lane(Vec const* weights, int, int, int slot_pitch, IntVec, int, Vec*,
                                                 int& pitch) {
    pitch = slot_pitch;
    return reinterpret_cast<Word const*>(weights);
  }
  // Words of a sum operand with the tokens [begin, end) of the word only, the rest 0.
  NATTEN_INLINE static Vec keep_tokens(Vec words, int, int) { return words; }
};

#if defined(__AVX512BF16__)
struct BFloat16Math {
  using Storage = BFloat16;
  static constexpr int kPerWord = 2;

  NATTEN_INLINE static Vec load_words(Storage const* row, int first) { return load_as<Vec>(row + 2 * first); }
  NATTEN_INLINE static Vec load_words(Storage const* row, int first, int dim) {
    int left = dim - 2 * first;
    if (left >= 2 * kLanes) return load_words(row, first);
    Storage padded[2 * kLanes] = {};
    std::memcpy(padded, row + 2 * first, left * sizeof(Storage));
    return load_as<Vec>(padded);
  }
  // Word c holds channel c of two tokens; zero behind the first n channels.
  NATTEN_INLINE static Vec interleave(Storage const* even, Storage const* odd, int n) {
    return bit_cast<Vec>(channels(even, n) | (channels(odd, n) << 16));
  }
  NATTEN_INLINE static Vec multiply_add(Vec sum, Vec a, Word const* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(*b)));
  }
  NATTEN_INLINE static Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  // In place: vector j of a row becomes the bfloat16 pairs of slots 2j and 2j + 1, in lanes that are `odd` of slots 2j - 1 and 2j.
  // Slots are even in number, or zeros follow and come before them, so that a row of words has zeros behind its end, too.
  NATTEN_INLINE static int weights_to_words(Vec* weights, int rows, int slots, int pitch, IntVec odd) {
    if (slots == pitch) {
      for (int j = 0; j < rows * slots / 2; ++j) weights[j] = pair_words(weights[2 * j], weights[2 * j + 1]);
      return slots / 2;
    }
    int const words = slots / 2 + 1;
    int const word_pitch = words + (pitch - slots) / 2 + 1;
    for (int r = 0; r < rows; ++r) {
      Vec const* const from = weights + r * pitch;
      Vec* const to = weights + r * word_pitch;
      for (int j = 0; j < words; ++j) {
        Vec const middle = from[2 * j];
        to[j] = pair_words(odd ? from[2 * j - 1] : middle, odd ? middle : from[2 * j + 1]);
      }
      for (int j = words; j < word_pitch; ++j) to[j] = Vec{};
    }
    return word_pitch;
  }
  // Word j of token t, at [t * kLanes + j], is the bfloat16 pair of lanes 2j and 2j + 1.
  NATTEN_INLINE static Word const* weights_by_lane(Vec const* weights, int tokens, Vec* scratch) {
    for (int t = 0; t < tokens; ++t) store_as(&scratch[t], _mm512_cvtneps_pbh(weights[t]));
    return reinterpret_cast<Word const*>(scratch);
  }
  // Word j of slot s is the bfloat16 pair of lanes 2j and 2j + 1 for one token: slot s of the first, and of the second the slot
  // as much before it as its slots begin later. Around each row there are zeros for groups of `group` tokens.
  NATTEN_INLINE static Word const* slots_by_lane(Vec const* weights, int rows, int slots, int slot_pitch, IntVec from,
                                                 int group, Vec* scratch, int& pitch) {
    IntVec lag = {};
    int longest = 0;
    for (int l = 1; l < kLanes; l += 2) {
      lag[l] = from[l] - from[l - 1];
      longest = longest > lag[l] ? longest : lag[l];
    }
    pitch = slots + longest + (group - 1);
    Vec* to = scratch;
    for (int i = 1; i < group; ++i) *to++ = Vec{};
    for (int r = 0; r < rows; ++r, weights += slot_pitch) {
      for (int s = 0; s < slots + longest; ++s) {
        Vec pairs = weights[s];
        for (int d = 1; d <= longest; ++d) pairs = lag == d ? weights[s - d] : pairs;
        store_as(to++, _mm512_cvtneps_pbh(pairs));
      }
      for (int i = 1; i < group; ++i) *to++ = Vec{};
    }
    return reinterpret_cast<Word const*>(scratch + (group - 1));
  }
  NATTEN_INLINE static Vec keep_tokens(Vec words, int begin, int end) {
    return bit_cast<Vec>(bit_cast<UintVec>(words) & ((begin == 0 ? 0xffffu : 0u) | (end == 2 ? 0xffff0000u : 0u)));
  }

 private:
  // Word l is the bfloat16 pair of lane l of both.
  NATTEN_INLINE static Vec pair_words(Vec even, Vec odd) {
    // The instruction puts one source's lanes behind the other's; a word needs them side by side.
    return bit_cast<Vec>(interleave_halves(bit_cast<UintVec>(_mm512_cvtne2ps_pbh(odd, even))));
  }
  NATTEN_INLINE static UintVec channels(Storage const* row, int n) {
    if (n >= kLanes) return __builtin_convertvector(load_as<HalfVec>(row), UintVec);
    Storage padded[kLanes] = {};
    std::memcpy(padded, row, n * sizeof(Storage));
    return __builtin_convertvector(load_as<HalfVec>(padded), UintVec);
  }
  NATTEN_INLINE static UintVec interleave_halves(UintVec halves) {
    HalfVec low, high;
    std::memcpy(&low, &halves, sizeof low);
    std::memcpy(&high, reinterpret_cast<char const*>(&halves) + sizeof low, sizeof high);
    return __builtin_convertvector(low, UintVec) | (__builtin_convertvector(high, UintVec) << 16);
  }
};
#endif

}  // namespace natten::cpu::NATTEN_CPU_ISA
