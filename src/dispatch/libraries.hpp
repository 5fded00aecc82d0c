// SPDX-License-Identifier: MIT
// Libraries of CUDA kernels: the package's own, loaded when a CUDA kernel is first needed, and those that users load.
#pragma once

#include <list>
#include <string>

#include "dispatch/table.hpp"
#include "natten/cuda/library.hpp"

namespace natten {

// Of a tile: what choose_tile_shapes knows. Powers of two.
constexpr int kMostTileTokens = 256;
constexpr bool is_tile_size(int tokens) {
  return tokens > 0 && tokens <= kMostTileTokens && (tokens & (tokens - 1)) == 0;
}

// Every kernel there is, in order of preference: those of users' libraries (the last loaded first), then our own.
// Elements stay where they are.
std::list<Kernel> const& kernels();

// A library that was loaded.
struct LoadedLibrary {
  std::string path;
  cuda::Library const* contents;
  int driver_version;  // asked for when it was loaded
};
std::list<LoadedLibrary> const& libraries();

// Loads a user's library. Throws std::invalid_argument if it is none, was built against another version, or has a
// kernel of a name that is taken.
void load_kernels(std::string const& path);

// The code of a CUDA kernel; null if no library that is loaded, or comes with the package, has it.
cuda::KernelInfo const* find_code(Kernel const& kernel);

// Why the driver cannot run the code of a CUDA kernel, which there is; empty: it can.
std::string trouble_with_driver(Kernel const& kernel);

// Why the package's own library could not be loaded; empty: it was, or there is none.
std::string error_of_own_library();

}  // namespace natten
