// SPDX-License-Identifier: MIT
// What CUDA C++ has without an include, for a compiler of the host.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <string>

#include "emulation/simt.hpp"

// Without constructors, so that reading them is no function call.
extern __thread uint3 threadIdx;
extern __thread uint3 blockIdx;
extern __thread uint3 blockDim;
extern __thread uint3 gridDim;

inline void __syncthreads() { natten::emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { natten::emulation::warp_barrier(mask); }

namespace natten::emulation {

// The value that the lane `source` calls this with.
template <class T>
T shuffle(char const* operation, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  int const mine = lane();
  give(sizeof(T), 1, &mine, &value);
  meet(operation, mask);
  if (!(mask >> source & 1)) throw Error(std::string(operation) + ": the lane that is read is not in the mask");
  T result;
  take(sizeof(T), 1, &source, &result);
  return result;
}

}  // namespace natten::emulation

// `width` cuts the warp into parts, beyond whose ends a lane reads itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  int const begin = natten::emulation::lane() & -width;
  return natten::emulation::shuffle("__shfl_sync", mask, value, begin + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int const lane = natten::emulation::lane(), source = lane ^ bits;
  return natten::emulation::shuffle("__shfl_xor_sync", mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32) {
  int const lane = natten::emulation::lane(), source = lane + distance;
  return natten::emulation::shuffle("__shfl_down_sync", mask, value, source < (lane & -width) + width ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int const mine = natten::emulation::lane();
  natten::emulation::give(4, 1, &mine, &predicate);
  natten::emulation::meet("__ballot_sync", mask);
  unsigned votes = 0;
  for (int lane = 0; lane < natten::emulation::kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    int vote;
    natten::emulation::take(4, 1, &lane, &vote);
    votes |= unsigned(vote != 0) << lane;
  }
  return votes;
}

template <class T>
T __ldg(T const* address) {
  return *address;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) {
  float const volatile product = a * b;  // not contracted with what is added to it
  return product;
}
inline double __dmul_rn(double a, double b) {
  double const volatile product = a * b;
  return product;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
