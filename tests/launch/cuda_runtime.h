// SPDX-License-Identifier: MIT
// Stands for CUDA's header of this name, so that a host compiler takes natten/cuda/launch.hpp: a runtime that only counts.
// As the real one, it keeps the last error until somebody asks for it.
#pragma once

#include <cstddef>

#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct dim3 {
  explicit dim3(unsigned x) : x(x) {}
  unsigned x;
};

inline cudaError_t last = cudaSuccess;
inline int launches = 0;
constexpr std::size_t kMostShared = 100 * 1024;

inline cudaError_t note(bool is_right) {
  if (!is_right) last = cudaErrorInvalidValue;
  return is_right ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetLastError() {
  cudaError_t const error = last;
  last = cudaSuccess;
  return error;
}
inline char const* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaFuncSetAttribute(void (*)(int), cudaFuncAttribute, int bytes) {
  return note(std::size_t(bytes) <= kMostShared);
}
inline cudaError_t cudaLaunchKernel(void const*, dim3, dim3 threads, void** arguments, std::size_t bytes,
                                    cudaStream_t) {
  bool const is_right = threads.x <= 1024 && bytes <= kMostShared && *static_cast<int*>(arguments[0]) == 42;
  launches += is_right;
  return note(is_right);
}
