// SPDX-License-Identifier: MIT
// The binary interface of a library of CUDA kernels: the package's own, a user's plug-in, and the one the tests run on
// the CPU. It is loaded at run time, so that importing the package needs neither a GPU nor a driver.
#pragma once

#include "natten/arguments.hpp"

namespace natten::cuda {

// Raised with every change of a struct below, or of one that is reached from it.
constexpr int kAbiVersion = 1;

struct LaunchContext {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // workspace_bytes() of device memory, aligned to 256 bytes
  TileShapes by_query;        // queries are owned and keys streamed: forward, and the gradient of the query
  TileShapes by_key;          // keys are owned and queries streamed: the gradients of key and value
};

// A kernel of the table. Entry points return 0, or fill `message` with what went wrong and return 1.
struct KernelInfo {
  char const* name;
  char const* backend;
  char const* policy;  // the architecture it is written for, as in the kernel table
  int is_backward;
  DType dtype;
  int is_tf32;               // rounds float32 operands to TF32
  int min_arch, max_arch;    // the architectures it is chosen on, 80 for SM80; may be forced on any later one
  int max_head_dim;
  int own_tokens, streamed_tokens;  // of its tiles; 0 where it has none
  int const* archs;                 // that it was compiled for, ascending
  int num_archs;
  std::int64_t (*workspace_bytes)(BackwardArguments const*, LaunchContext const*);  // null: needs none
  int (*forward)(ForwardArguments const*, LaunchContext const*, char* message, int size);
  int (*backward)(BackwardArguments const*, LaunchContext const*, char* message, int size);
};

struct Library {
  int abi_version;
  int arguments_bytes;  // sizeof(BackwardArguments): catches a library of other headers
  int num_kernels;
  KernelInfo const* kernels;
  char const* toolkit;  // such as "CUDA 13.0"
  int on_host;          // its kernels run on the CPU, on host memory: only for tests, by name
};

}  // namespace natten::cuda

// The only symbol that a library exports.
#define NATTEN_CUDA_LIBRARY natten_cuda_library
extern "C" natten::cuda::Library const* NATTEN_CUDA_LIBRARY();
