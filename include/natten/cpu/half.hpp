// SPDX-License-Identifier: MIT
// The 16-bit storage types, one scalar at a time. Arithmetic is always float.
#pragma once

#include <cstdint>
#include <cstring>

#include "natten/window.hpp"

namespace natten::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

NATTEN_INLINE std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

NATTEN_INLINE float bits_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

NATTEN_INLINE double to_float(double x) { return x; }
NATTEN_INLINE float to_float(float x) { return x; }
NATTEN_INLINE float to_float(BFloat16 x) { return bits_float(std::uint32_t{x.bits} << 16); }

// Shifts the fields into place and re-biases the exponent. Subnormals, which have none, get one that a subtraction takes away
// again: no number on the way is a subnormal float, which the processor may have been told to take for 0.
NATTEN_INLINE float to_float(Float16 x) {
  std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  std::uint32_t magnitude = std::uint32_t{x.bits & 0x7fffu} << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | 0x70000000u | magnitude);  // infinity, NaN
  if (magnitude >= 0x00800000u) return bits_float(sign | (magnitude + 0x38000000u));
  return bits_float(sign | float_bits(bits_float(magnitude + 0x38800000u) - 0x1p-14f));
}

template <class T>
T from_float(double x);

template <>
NATTEN_INLINE double from_float<double>(double x) {
  return x;
}

template <>
NATTEN_INLINE float from_float<float>(double x) {
  return static_cast<float>(x);
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
NATTEN_INLINE BFloat16 from_float<BFloat16>(double value) {
  float x = static_cast<float>(value);
  std::uint32_t bits = float_bits(x);
  if (x != x) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
NATTEN_INLINE Float16 from_float<Float16>(double value) {
  float x = static_cast<float>(value);
  std::uint32_t bits = float_bits(x);
  std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (x != x) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to infinity from 65520
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the unit in the last place at 2^-24, and the FPU does the rounding.
    std::uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    return {static_cast<std::uint16_t>(sign | rounded)};
  }
  std::uint32_t rounded = magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

}  // namespace natten::cpu
