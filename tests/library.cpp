// SPDX-License-Identifier: MIT
// A library of kernels that compute nothing, for tests of loading, dispatch and launches: they fail, and their message is
// what they were launched with. Compiled by tests/test_libraries.py, which defines TEST_NAME, TEST_ON_HOST and TEST_ABI.
#include <cstdio>

#include "natten/cuda/library.hpp"

namespace natten::cuda {
namespace {

template <class Arguments>
int say(Arguments const*, LaunchContext const* context, char* message, int size) {
  auto const& q = context->by_query;
  auto const& k = context->by_key;
  std::snprintf(message, size,
                "by query %dx%dx%d past %dx%dx%d, by key %dx%dx%d past %dx%dx%d, stream %d, workspace %d", q.own[0],
                q.own[1], q.own[2], q.streamed[0], q.streamed[1], q.streamed[2], k.own[0], k.own[1], k.own[2],
                k.streamed[0], k.streamed[1], k.streamed[2], context->stream != nullptr, context->workspace != nullptr);
  return 1;
}

template <class Arguments>
std::int64_t workspace_bytes(Arguments const*, LaunchContext const*) {
  return 1000;
}

constexpr int kArchs[] = {80, 86};

constexpr KernelInfo info(Op op, char const* name) {
  KernelInfo kernel = {name, "fna", TEST_NAME, op, DType::kFloat32, 0, 80, 90, 64, 64, 32, kArchs, 2, 0, {}, {}, {}};
  if (op == Op::kForward) kernel.forward = {say<ForwardArguments>, nullptr};
  if (op == Op::kBackward) kernel.backward = {say<BackwardArguments>, workspace_bytes<BackwardArguments>};
  return kernel;
}

KernelInfo const kKernels[] = {info(Op::kForward, TEST_NAME "_forward"), info(Op::kBackward, TEST_NAME "_backward")};
Library const kLibrary = {TEST_ABI, sizeof(BackwardArguments), 2, kKernels, "no toolkit", TEST_ON_HOST};

}  // namespace
}  // namespace natten::cuda

extern "C" __attribute__((visibility("default"))) natten::cuda::Library const* NATTEN_CUDA_LIBRARY() {
  return &natten::cuda::kLibrary;
}
