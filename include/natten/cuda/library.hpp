// SPDX-License-Identifier: MIT
// The binary interface of a library of CUDA kernels: the package's own, a user's plug-in, and the one the tests run on
// the CPU. It is loaded at run time, so that importing the package needs neither a GPU nor a driver.
#pragma once

#include "natten/arguments.hpp"

namespace natten::cuda {

// Raised with every change of a struct below, or of one that is reached from it.
constexpr int kAbiVersion = 3;

constexpr int kAnyLater = 0x7fffffff;

struct LaunchContext {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // workspace_bytes() of device memory, aligned to 256 bytes
  TileShapes by_query;        // queries are owned and keys streamed: forward, and the gradient of the query
  TileShapes by_key;  // keys are owned and queries streamed: the gradients of key and value, and kAvTransposed
  std::int64_t max_blocks = 0x7fffffff;  // of a grid; kernels loop over what is left
};

template <class Arguments>
struct Entry {
  // Returns 0, or fills `message` with what went wrong and returns 1.
  int (*run)(Arguments const*, LaunchContext const*, char* message, int size);
  std::int64_t (*workspace_bytes)(Arguments const*, LaunchContext const*);  // null: needs none
};

// A kernel of the table.
struct KernelInfo {
  char const* name;
  char const* backend;
  char const* policy;  // the architecture it is written for, as in the kernel table
  Op op;
  DType dtype;
  int is_tf32;  // rounds float32 operands to TF32
  int min_arch,
      max_arch;  // the architectures it is chosen on, 80 for SM80; may be forced on any later one. kAnyLater: no end
  int max_head_dim;
  int own_tokens, streamed_tokens;  // of its tiles; 0 where it has none
  int const* archs;  // that it was compiled for, ascending
  int num_archs;
  int ptx_arch;  // that it has PTX of, which the driver compiles for later ones; 0: none
  // One of them is there, by the op; the others are null.
  Entry<ForwardArguments> forward;
  Entry<BackwardArguments> backward;
  Entry<UnfusedArguments> unfused;
};

struct Library {
  int abi_version;
  int arguments_bytes;  // sizeof(BackwardArguments): catches a library of other headers
  int num_kernels;
  KernelInfo const* kernels;
  char const* toolkit;  // such as "CUDA 13.0"
  int runtime_version;       // of CUDA's runtime in it, 13000 for 13.0
  int (*driver_version)();   // the newest CUDA that the driver supports, 0 without a driver; null where on_host
  int on_host;  // its kernels run on the CPU, on host memory: only for tests, by name
};

}  // namespace natten::cuda

// The only symbol that a library exports.
#define NATTEN_CUDA_LIBRARY natten_cuda_library
extern "C" natten::cuda::Library const* NATTEN_CUDA_LIBRARY();
