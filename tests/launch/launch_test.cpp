// SPDX-License-Identifier: MIT
// A launch that fails says why, once: not the next one, too.
#include <cstdio>
#include <stdexcept>

#include "natten/cuda/launch.hpp"

namespace natten::cuda {
alignas(128) char shared[1];  // that kernels declare
}

namespace {

template <int kThreads_>
struct Kernel {
  using Params = int;
  static constexpr int kThreads = kThreads_;
  static constexpr int kMinBlocks = 1;
  void operator()(Params const&, char*) const {}
};

int failures = 0;

void check(bool condition, char const* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

template <class Launch>
bool fails(Launch const& launch) {
  try {
    launch();
    return false;
  } catch (std::runtime_error const&) {
    return true;
  }
}

}  // namespace

int main() {
  natten::cuda::Launcher const launch{natten::cuda::LaunchContext{}};
  auto const good = [&] { launch(Kernel<128>{}, 42, 10, 64 * 1024); };
  check(!fails(good) && launches == 1, "a good launch");
  check(fails([&] { launch(Kernel<128>{}, 42, 10, 1 << 20); }), "too much shared memory");
  check(cudaGetLastError() == cudaSuccess, "no error is left of setting the shared memory");
  check(fails([&] { launch(Kernel<2048>{}, 42, 10, 0); }), "too many threads");
  check(cudaGetLastError() == cudaSuccess, "no error is left of a launch");
  check(fails([&] { launch(Kernel<128>{}, 42, std::int64_t{1} << 31, 0); }), "too many blocks");
  check(!fails(good) && launches == 2, "a good launch after others");
  check(!fails([&] { launch(Kernel<128>{}, 42, 0, 0); }) && launches == 2, "nothing to launch");
  return failures;
}
