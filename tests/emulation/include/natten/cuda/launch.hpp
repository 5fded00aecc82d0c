// SPDX-License-Identifier: MIT
// Stands before the header of this name: kernel functors run on the CPU, and pointers are those of the host.
#pragma once

#include "emulation/simt.hpp"
#include "natten/cuda/library.hpp"

namespace natten::cuda {

class Launcher {
 public:
  explicit Launcher(LaunchContext const&) {}

  template <class Kernel>
  void operator()(Kernel, typename Kernel::Params const& params, std::int64_t blocks, int shared_bytes) const {
    auto const body = [](void const* state, char* shared) {
      Kernel{}(*static_cast<typename Kernel::Params const*>(state), shared);
    };
    emulation::launch({blocks, Kernel::kThreads, shared_bytes}, body, &params);
  }
};

}  // namespace natten::cuda
