// SPDX-License-Identifier: MIT
// A library of kernels that compute nothing, for tests of loading, dispatch and launches: they fail, and their message is
// what they were launched with. Compiled by tests/test_libraries.py, which defines TEST_NAME, TEST_ON_HOST,
// TEST_ABI, the CUDA that the driver supports (TEST_DRIVER), and what is wrong with the table (TEST_FAULT), if anything is.
#include <cstdint>
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

enum Fault {
  kNone,
  kNoTable,
  kNoKernels,
  kNoName,
  kNoEntry,
  kHugeTiles,
  kNoArchs,
  // Pointers that lead out of the library, or to what is not of their kind there.
  kForeignTable,
  kForeignKernels,
  kTooManyKernels,
  kForeignName,
  kForeignPolicy,
  kForeignEntry,
  kEntryOfData,
  kForeignWorkspace,
  kForeignArchs,
  kTooManyArchs,
  kForeignToolkit,
  kForeignDriver
};
constexpr Fault kFault = TEST_FAULT;

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
  if (kFault == kNoName) kernel.name = nullptr;
  if (kFault == kNoEntry) kernel.forward = {};
  if (kFault == kHugeTiles) kernel.own_tokens = 4096;
  if (kFault == kNoArchs) kernel.archs = nullptr;
  if (op == Op::kForward) return kernel;
  // The last one: all of them are looked at.
  if (kFault == kForeignName) kernel.name = foreign<char const*>();
  if (kFault == kForeignPolicy) kernel.policy = foreign<char const*>();
  if (kFault == kForeignEntry) kernel.backward.run = foreign<decltype(kernel.backward.run)>();
  if (kFault == kEntryOfData) kernel.backward.run = reinterpret_cast<decltype(kernel.backward.run)>(&kArchs);
  if (kFault == kForeignWorkspace)
    kernel.backward.workspace_bytes = foreign<decltype(kernel.backward.workspace_bytes)>();
  if (kFault == kForeignArchs) kernel.archs = foreign<int const*>();
  if (kFault == kTooManyArchs) kernel.num_archs = 1 << 30;
  return kernel;
}

KernelInfo const kKernels[] = {info(Op::kForward, TEST_NAME "_forward"), info(Op::kBackward, TEST_NAME "_backward")};
Library const kLibrary = {TEST_ABI,
                          sizeof(BackwardArguments),
                          kFault == kTooManyKernels ? 1 << 30 : 2,
                          kFault == kNoKernels        ? nullptr
                          : kFault == kForeignKernels ? foreign<KernelInfo const*>()
                                                      : kKernels,
                          kFault == kForeignToolkit ? foreign<char const*>() : "no toolkit",
                          13000,
                          kFault == kForeignDriver ? foreign<int (*)()>() : driver_version,
                          TEST_ON_HOST};

}  // namespace
}  // namespace natten::cuda

extern "C" __attribute__((visibility("default"))) natten::cuda::Library const* NATTEN_CUDA_LIBRARY() {
  using namespace natten::cuda;
  if (kFault == kForeignTable) return foreign<Library const*>();
  return kFault == kNoTable ? nullptr : &kLibrary;
}
