// SPDX-License-Identifier: MIT
// What the entry points of a library of kernels (library.hpp) have in common.
#pragma once

#include <cstdio>
#include <exception>

namespace natten::cuda {

// Exceptions must not leave a library: 0, or what went wrong in `message` and 1.
template <class Run>
int report_failure(char const* kernel, char* message, int size, Run&& run) {
  try {
    run();
    return 0;
  } catch (std::exception const& error) {
    std::snprintf(message, size, "%s: %s", kernel, error.what());
    return 1;
  }
}

}  // namespace natten::cuda
