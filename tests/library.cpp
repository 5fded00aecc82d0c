// SPDX-License-Identifier: MIT
// A library of kernels that compute nothing, for tests of loading, dispatch and launches: they fail, and their message is
// what they were launched with. Compiled by tests/test_libraries.py, which defines TEST_NAME, TEST_ON_HOST,
// TEST_ABI and the CUDA that the driver supports (TEST_DRIVER). What is wrong with the table, if anything is, the environment
// says (TEST_FAULT) when it is loaded.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

// Whether this is what is wrong with the table.
bool is_fault(char const* fault) {
  char const* const wanted = std::getenv("TEST_FAULT");
  return wanted != nullptr && std::strcmp(wanted, fault) == 0;
}

// Neither null nor mapped.
template <class Pointer>
Pointer foreign() {
  return reinterpret_cast<Pointer>(std::uintptr_t{0x1000});
}

int driver_version() { return TEST_DRIVER; }

KernelInfo info(Op op, char const* name) {
  KernelInfo kernel = {name, "fna", TEST_NAME, op, DType::kFloat32, 0, 80, 90, 64, 64, 32, kArchs, 2, 0, {}, {}, {}};
  if (op == Op::kForward) kernel.forward = {say<ForwardArguments>, nullptr};
  if (op == Op::kBackward) kernel.backward = {say<BackwardArguments>, workspace_bytes<BackwardArguments>};
  if (is_fault("no name")) kernel.name = nullptr;
  if (is_fault("no entry")) kernel.forward = {};
  if (is_fault("huge tiles")) kernel.own_tokens = 4096;
  if (is_fault("no archs")) kernel.archs = nullptr;
  if (op == Op::kForward) return kernel;
  // The last one: all of them are looked at.
  if (is_fault("foreign name")) kernel.name = foreign<char const*>();
  if (is_fault("foreign policy")) kernel.policy = foreign<char const*>();
  if (is_fault("foreign entry")) kernel.backward.run = foreign<decltype(kernel.backward.run)>();
  if (is_fault("entry of data")) kernel.backward.run = reinterpret_cast<decltype(kernel.backward.run)>(&kArchs);
  if (is_fault("foreign workspace"))
    kernel.backward.workspace_bytes = foreign<decltype(kernel.backward.workspace_bytes)>();
  if (is_fault("foreign archs")) kernel.archs = foreign<int const*>();
  if (is_fault("too many archs")) kernel.num_archs = 1 << 30;
  return kernel;
}

KernelInfo const kKernels[] = {info(Op::kForward, TEST_NAME "_forward"), info(Op::kBackward, TEST_NAME "_backward")};
Library const kLibrary = {TEST_ABI,
                          sizeof(BackwardArguments),
                          is_fault("too many kernels") ? 1 << 30 : 2,
                          is_fault("no kernels")        ? nullptr
                          : is_fault("foreign kernels") ? foreign<KernelInfo const*>()
                                                        : kKernels,
                          is_fault("foreign toolkit") ? foreign<char const*>() : "no toolkit",
                          13000,
                          is_fault("foreign driver") ? foreign<int (*)()>() : driver_version,
                          TEST_ON_HOST};

}  // namespace
}  // namespace natten::cuda

extern "C" __attribute__((visibility("default"))) natten::cuda::Library const* NATTEN_CUDA_LIBRARY() {
  using namespace natten::cuda;
  if (is_fault("foreign table")) return foreign<Library const*>();
  return is_fault("no table") ? nullptr : &kLibrary;
}
