// SPDX-License-Identifier: MIT
#include "dispatch/libraries.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

namespace natten {

namespace {

constexpr char const* kOwnLibrary = "libnatten_cuda.so";

struct Registry {
  std::mutex mutex;
  std::list<Kernel> kernels{own_kernels().begin(), own_kernels().end()};
  std::list<LoadedLibrary> libraries;
  std::map<std::string, cuda::KernelInfo const*> code;  // by name of the kernel
  bool own_is_loaded = false;

  static Registry& instance() {
    static Registry registry;
    return registry;
  }
};

std::string last_error() {
  char const* const text = dlerror();
  return text != nullptr ? text : "unknown error";
}

cuda::Library const* open_library(std::string const& path) {
  auto const fail = [&](std::string const& why) -> std::invalid_argument {
    return std::invalid_argument("path = '" + path + "' is not a library of natten kernels: " + why);
  };
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw fail(last_error());
  using Function = cuda::Library const* (*)();
  auto const function = reinterpret_cast<Function>(dlsym(handle, "natten_cuda_library"));
  if (function == nullptr) throw fail(last_error());
  cuda::Library const* const library = function();
  if (library->abi_version != cuda::kAbiVersion || library->arguments_bytes != int(sizeof(BackwardArguments))) {
    throw fail("it was built for interface " + std::to_string(library->abi_version) + " of " +
               std::to_string(library->arguments_bytes) + " bytes, and this natten has interface " +
               std::to_string(cuda::kAbiVersion) + " of " + std::to_string(sizeof(BackwardArguments)) +
               " bytes; build it again with this version's headers");
  }
  return library;
}

void add(Registry& registry, std::string const& path, cuda::Library const& library) {
  registry.libraries.push_back({path, &library});
  for (int i = 0; i < library.num_kernels; ++i) {
    registry.code[library.kernels[i].name] = &library.kernels[i];
  }
}

// Beside this one. A build without CUDA has none.
void load_own(Registry& registry) {
  if (registry.own_is_loaded) return;
  registry.own_is_loaded = true;
  Dl_info self;
  if (dladdr(reinterpret_cast<void const*>(&find_code), &self) == 0 || self.dli_fname == nullptr) return;
  char const* const slash = std::strrchr(self.dli_fname, '/');
  std::string const folder = slash == nullptr ? "" : std::string(self.dli_fname, slash + 1);
  std::string const path = folder + kOwnLibrary;
  if (void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL); handle != nullptr) {
    add(registry, path, *open_library(path));
  }
}

// Before the kernels of its kind that would pad as much or more: a row for head dim 96 does not take problems of 64.
std::list<Kernel>::const_iterator place_of(Kernel const& kernel, std::list<Kernel> const& table) {
  auto const place = std::find_if(table.begin(), table.end(), [&](Kernel const& row) {
    return row.op == kernel.op && row.dtype == kernel.dtype && row.max_head_dim >= kernel.max_head_dim &&
           std::strcmp(row.backend, kernel.backend) == 0 && std::strcmp(row.isa, kernel.isa) == 0;
  });
  return place == table.end() ? table.begin() : place;
}

}  // namespace

std::list<Kernel> const& kernels() { return Registry::instance().kernels; }

std::list<LoadedLibrary> const& libraries() {
  Registry& registry = Registry::instance();
  std::lock_guard const lock(registry.mutex);
  load_own(registry);
  return registry.libraries;
}

void load_kernels(std::string const& path) {
  Registry& registry = Registry::instance();
  std::lock_guard const lock(registry.mutex);
  load_own(registry);
  cuda::Library const& library = *open_library(path);
  for (int i = 0; i < library.num_kernels; ++i) {
    std::string const name = library.kernels[i].name;
    for (Kernel const& kernel : registry.kernels) {
      if (name == kernel.name) {
        throw std::invalid_argument("path = '" + path + "' has a kernel '" + name + "', and there is one already");
      }
    }
  }
  add(registry, path, library);
  for (int i = 0; i < library.num_kernels; ++i) {
    cuda::KernelInfo const& info = library.kernels[i];
    Kernel kernel{};
    kernel.name = info.name;
    kernel.op = info.op;
    kernel.backend = info.backend;
    kernel.isa = info.policy;
    kernel.dtype = info.dtype;
    kernel.max_head_dim = info.max_head_dim;
    kernel.cuda = {true,          library.on_host != 0, info.is_tf32 != 0,   info.min_arch,
                   info.max_arch, info.own_tokens,      info.streamed_tokens};
    registry.kernels.insert(place_of(kernel, registry.kernels), kernel);
  }
}

cuda::KernelInfo const* find_code(Kernel const& kernel) {
  Registry& registry = Registry::instance();
  std::lock_guard const lock(registry.mutex);
  load_own(registry);
  auto const found = registry.code.find(kernel.name);
  return found == registry.code.end() ? nullptr : found->second;
}

}  // namespace natten
