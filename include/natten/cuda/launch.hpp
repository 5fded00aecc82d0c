// SPDX-License-Identifier: MIT
// Runs a kernel functor on a GPU. A kernel is
//
//   struct Kernel {
//     struct Params { ... };                                      // trivially copyable
//     static constexpr int kThreads, kMinBlocks;                  // per block; blocks that should fit on a multiprocessor
//     CUTE_DEVICE void operator()(Params const&, char* shared) const;  // all shared memory there is, 128-byte aligned
//   };
//
// and its host function `run(arguments, context, launch)` calls launch(Kernel{}, params, blocks, shared_bytes) in
// stream order. Tests put another launcher in this header's place.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "natten/cuda/library.hpp"

// Parameters stay in constant memory, wherever they are indexed; SM50 and SM60 copy those to the stack.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
#define NATTEN_GRID_CONSTANT __grid_constant__
#else
#define NATTEN_GRID_CONSTANT
#endif

namespace natten::cuda {

// Static: a weak symbol would be merged with that of a unit which was compiled for other architectures, and launches find
// their code by its address.
template <class Kernel>
static __global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run_on_device(NATTEN_GRID_CONSTANT typename Kernel::Params const params) {
  extern __shared__ __align__(128) char shared[];
  Kernel{}(params, shared);
}

class Launcher {
 public:
  explicit Launcher(LaunchContext const& context) : stream_(static_cast<cudaStream_t>(context.stream)) {}

  template <class Kernel>
  void operator()(Kernel, typename Kernel::Params const& params, std::int64_t blocks, int shared_bytes) const {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error(std::to_string(blocks) + " thread blocks exceed 2^31 - 1");
    auto const kernel = run_on_device<Kernel>;
    constexpr int kSharedWithoutAsking = 48 * 1024;
    if (shared_bytes > kSharedWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "setting its shared memory");
    }
    void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
    check(cudaLaunchKernel(reinterpret_cast<void const*>(kernel), dim3(static_cast<unsigned>(blocks)),
                           dim3(Kernel::kThreads), arguments, static_cast<std::size_t>(shared_bytes), stream_),
          "launching it");
  }

 private:
  static void check(cudaError_t error, char const* action) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps it, for whoever asks next
    throw std::runtime_error(std::string(action) + " failed: " + cudaGetErrorString(error));
  }

  cudaStream_t stream_;
};

}  // namespace natten::cuda
