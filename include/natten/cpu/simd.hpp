// SPDX-License-Identifier: MIT
// One vector register of the ISA this file is compiled for, through the compiler's vector extensions: a width, loads
// and stores with conversion, 2^x and a transposition. Everything that differs between ISAs is in this file, and
// everything in it is force-inlined, so that an object file exports nothing that another ISA could pick up.
//
// Include only where NATTEN_CPU_ISA names the namespace of the ISA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "natten/cpu/half.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = std::int32_t __attribute__((vector_size(kLanes * 4)));
using UintVec = std::uint32_t __attribute__((vector_size(kLanes * 4)));
using HalfVec = std::uint16_t __attribute__((vector_size(kLanes * 2)));

constexpr float kInfinity = __builtin_inff();

template <class To, class From>
NATTEN_INLINE To bit_cast(From const& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

NATTEN_INLINE IntVec broadcast(std::int32_t x) { return IntVec{} + x; }
NATTEN_INLINE UintVec broadcast(std::uint32_t x) { return UintVec{} + x; }
// Not by an addition to 0, which changes subnormal numbers, where they are taken for 0, and some NaNs.
NATTEN_INLINE Vec broadcast(float x) { return bit_cast<Vec>(broadcast(float_bits(x))); }

template <class V, class T>
NATTEN_INLINE V load_as(T const* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
NATTEN_INLINE void store_as(T* p, V const& v) {
  std::memcpy(p, &v, sizeof v);
}

// kLanes elements as float.
NATTEN_INLINE Vec load_vec(float const* p) { return load_as<Vec>(p); }

NATTEN_INLINE Vec load_vec(BFloat16 const* p) {
  return bit_cast<Vec>(__builtin_convertvector(load_as<HalfVec>(p), UintVec) << 16);
}

NATTEN_INLINE Vec load_vec(Float16 const* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_as<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

NATTEN_INLINE void store_vec(float* p, Vec v) { store_as(p, v); }

// To nearest, ties to even; NaN stays NaN, which adding the rounding could turn into a number.
NATTEN_INLINE UintVec round_to_bfloat16(Vec v) {
  UintVec bits = bit_cast<UintVec>(v);
  UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : broadcast(std::uint32_t{0x7fc0});
}

NATTEN_INLINE void store_vec(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  store_as(p, _mm512_cvtneps_pbh(v));  // in one instruction, with subnormals to 0
#else
  store_as(p, __builtin_convertvector(round_to_bfloat16(v), HalfVec));
#endif
}

NATTEN_INLINE void store_vec(Float16* p, Vec v) {
#if defined(__AVX512F__)
  store_as(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_as(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// Only the chosen lanes (all bits set) of memory are touched; the others are zero. A masked access where the ISA has one: a
// memcpy of n bytes is a call.
template <class Storage>
NATTEN_INLINE Vec load_where(IntVec lanes, Storage const* p) {
#if defined(__AVX512F__)
  __mmask16 const mask = _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(Storage) == 4) return _mm512_maskz_loadu_ps(mask, p);
  __m256i const halves = _mm256_maskz_loadu_epi16(mask, p);
  return load_vec(reinterpret_cast<Storage const*>(&halves));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(Storage) == 4) return _mm256_maskload_ps(p, (__m256i)lanes);
#endif
  Storage padded[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    if (lanes[l]) padded[l] = p[l];
  }
  return load_vec(padded);
#endif
}

template <class Storage>
NATTEN_INLINE void store_where(IntVec lanes, Storage* p, Vec v) {
#if defined(__AVX512F__)
  __mmask16 const mask = _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(Storage) == 4) return _mm512_mask_storeu_ps(p, mask, v);
  __m256i halves;
  store_vec(reinterpret_cast<Storage*>(&halves), v);
  _mm256_mask_storeu_epi16(p, mask, halves);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(Storage) == 4) return _mm256_maskstore_ps(p, (__m256i)lanes, v);
#endif
  Storage padded[kLanes];
  store_vec(padded, v);
  for (int l = 0; l < kLanes; ++l) {
    if (lanes[l]) p[l] = padded[l];
  }
#endif
}

// Lanes [begin, end).
NATTEN_INLINE IntVec lanes_in(int begin, int end) {
  IntVec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  return (lane >= begin) & (lane < end);
}
// The first n < kLanes lanes.
NATTEN_INLINE IntVec first_lanes(int n) { return lanes_in(0, n); }
template <class Storage>
NATTEN_INLINE Vec load_first(Storage const* p, int n) {
  return load_where(first_lanes(n), p);
}
template <class Storage>
NATTEN_INLINE void store_first(Storage* p, Vec v, int n) {
  store_where(first_lanes(n), p, v);
}

// Stops the compiler from reading a value from memory again at each use.
NATTEN_INLINE void keep_in_register(Vec& v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+v"(v));
#endif
}

// A row of `dim` elements from floats in whole vectors, times a factor.
template <class Storage>
NATTEN_INLINE void store_row(Storage* to, float const* from, float factor, int dim) {
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) store_vec(to + c, load_vec(from + c) * factor);
  if (c < dim) store_first(to + c, load_vec(from + c) * factor, dim - c);
}

// Whether there are stores around the caches; else they are ordinary ones.
#if defined(__x86_64__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

// kLanes elements around the caches, to an aligned address: a line that is written whole is not read first, and takes no other's
// place. Other threads may read it after finish_streams().
template <class Storage>
NATTEN_INLINE void stream_vec(Storage* p, Vec v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Storage) == 4) return _mm512_stream_ps(p, v);
  __m256i halves;
  store_vec(reinterpret_cast<Storage*>(&halves), v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves);
#elif defined(__AVX2__)
  if constexpr (sizeof(Storage) == 4) return _mm256_stream_ps(p, v);
  __m128i halves;
  store_vec(reinterpret_cast<Storage*>(&halves), v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves);
#elif defined(__x86_64__)
  if constexpr (sizeof(Storage) == 4) return _mm_stream_ps(p, v);
  long long halves;
  store_vec(reinterpret_cast<Storage*>(&halves), v);
  _mm_stream_si64(reinterpret_cast<long long*>(p), halves);
#else
  store_vec(p, v);
#endif
}

// A row of whole lines, as store_row.
template <class Storage>
NATTEN_INLINE void stream_row(Storage* to, float const* from, float factor, int dim) {
  for (int c = 0; c < dim; c += kLanes) stream_vec(to + c, load_vec(from + c) * factor);
}

NATTEN_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Lane l is v[from[l]].
NATTEN_INLINE Vec permute(Vec v, IntVec from) { return __builtin_shuffle(v, from); }

// Lanes [kFirst, kFirst + kLanes) of two vectors side by side.
template <int kFirst>
NATTEN_INLINE Vec shifted(Vec low, Vec high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_alignr_epi32((__m512i)high, (__m512i)low, kFirst);
#else
  IntVec from;
  for (int l = 0; l < kLanes; ++l) from[l] = l + kFirst;
  return __builtin_shuffle(low, high, from);
#endif
}

NATTEN_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Halves added to halves: log2(kLanes) steps, where adding lane to lane would take kLanes of 4 cycles each.
template <int kWidth = kLanes / 2>
NATTEN_INLINE float sum(Vec v) {
  IntVec other;
  for (int i = 0; i < kLanes; ++i) other[i] = (i + kWidth) % kLanes;
  v += __builtin_shuffle(v, other);
  if constexpr (kWidth > 1) return sum<kWidth / 2>(v);
  return v[0];
}

// 2^x for x < 128, relative error 1e-7; 0 below 2^-126 (so exp2(-inf) is 0); NaN stays NaN.
// 2^f on [-1/2, 1/2] by a minimax polynomial of degree 5, times a power of two.
NATTEN_INLINE Vec exp2_fraction(Vec f) {
  Vec y = broadcast(1.327647129e-3f);
  y = y * f + 9.675540961e-3f;
  y = y * f + 5.550713092e-2f;
  y = y * f + 2.402212024e-1f;
  y = y * f + 6.931469440e-1f;
  return y * f + 1.000000119f;
}

NATTEN_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // Both instructions know what to do with infinities and NaN: 8 operations instead of 14.
  keep_in_register(x);  // not contracted with the subtraction, which would find what rounding a huge x has taken away
  Vec const whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_scalef_ps(exp2_fraction(x - whole), whole);
#else
  constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  Vec const shifted = x + kRounder;
  Vec const y = exp2_fraction(x - (shifted - kRounder));
  Vec const result = bit_cast<Vec>(bit_cast<UintVec>(y) + (bit_cast<UintVec>(shifted) << 23));
  // A NaN's payload would have been shifted into the exponent.
  return x < -126.0f ? Vec{} : (x == x ? result : x);
#endif
}

// log2(x) of normal x > 0, absolute error 1e-7 near 1; NaN stays NaN.
// x = 2^e f with f in [sqrt(1/2), sqrt(2)), and log f = 2 artanh((f - 1) / (f + 1)).
NATTEN_INLINE Vec log2(Vec x) {
  constexpr std::int32_t kSqrtHalf = 0x3f3504f3;
  IntVec const above = bit_cast<IntVec>(x) - kSqrtHalf;
  IntVec const e = above >> 23;
  Vec const f = bit_cast<Vec>((above & 0x007fffff) + kSqrtHalf);
  Vec const t = (f - 1.0f) / (f + 1.0f);
  Vec const t2 = t * t;
  Vec series = broadcast(2.885390082f / 9);  // 2 / log(2), then its odd fractions
  series = series * t2 + 2.885390082f / 7;
  series = series * t2 + 2.885390082f / 5;
  series = series * t2 + 2.885390082f / 3;
  series = series * t2 + 2.885390082f;
  Vec const result = __builtin_convertvector(e, Vec) + t * series;
  return x == x ? result : x;
}

// Transposes kLanes vectors of kLanes elements in log2(kLanes) rounds of pairwise interleaving.
template <int kRound = 1>
NATTEN_INLINE void transpose(Vec (&rows)[kLanes]) {
  constexpr int kHalf = kLanes / 2;
  IntVec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kHalf;
  }
  Vec next[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    next[2 * i] = __builtin_shuffle(rows[i], rows[i + kHalf], low);
    next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kHalf], high);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  if constexpr (2 * kRound < kLanes) transpose<2 * kRound>(rows);
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
