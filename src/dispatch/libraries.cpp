// SPDX-License-Identifier: MIT
#include "dispatch/libraries.hpp"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "dispatch/shared_object.hpp"

namespace natten {

namespace {

constexpr char const* kOwnLibrary = "libnatten_cuda.so";

struct Registry {
  std::mutex mutex;
  std::list<Kernel> kernels{own_kernels().begin(), own_kernels().end()};
  std::list<LoadedLibrary> libraries;
  struct Code {
    cuda::KernelInfo const* info;
    LoadedLibrary const* library;
  };
  std::map<std::string, Code> code;  // by name of the kernel
  bool own_is_loaded = false;
  std::string own_error;

  static Registry& instance() {
    static Registry registry;
    return registry;
  }
};

std::string last_error() {
  char const* const text = dlerror();
  return text != nullptr ? text : "unknown error";
}

// What is wrong with an entry of a table, as the end of a sentence about it.
std::string trouble_with_kernel(cuda::KernelInfo const& kernel, Mapping const& mapping) {
  if (!mapping.has_text(kernel.name)) return "has no name inside the library";
  if (!mapping.has_text(kernel.backend) || !mapping.has_text(kernel.policy)) {
    return "has no backend or no policy inside the library";
  }
  if (static_cast<int>(kernel.op) < 0 || static_cast<int>(kernel.op) > static_cast<int>(Op::kRpbGradient)) {
    return "is of an unknown op";
  }
  if (kernel.num_archs != 0 && !mapping.has(kernel.archs, kernel.num_archs)) {
    return "has no architectures inside the library";
  }
  bool const has_tiles = kernel.own_tokens != 0 || kernel.streamed_tokens != 0;
  if (has_tiles && !(is_tile_size(kernel.own_tokens) && is_tile_size(kernel.streamed_tokens))) {
    return "has tiles of " + std::to_string(kernel.own_tokens) + " and " + std::to_string(kernel.streamed_tokens) +
           " tokens; wanted powers of two, at most " + std::to_string(kMostTileTokens);
  }
  auto const has_entry = [&](auto const& entry) {
    bool const needs_workspace = entry.workspace_bytes != nullptr;
    return mapping.has_function(entry.run) && (!needs_workspace || mapping.has_function(entry.workspace_bytes));
  };
  bool const can_run = kernel.op == Op::kForward    ? has_entry(kernel.forward)
                       : kernel.op == Op::kBackward ? has_entry(kernel.backward)
                                                    : has_entry(kernel.unfused);
  return can_run ? "" : "has no entry point for its op inside the library";
}

cuda::Library const* open_library(std::string const& path) {
  auto const fail = [&](std::string const& why) -> std::invalid_argument {
    return std::invalid_argument("path = '" + path + "' is not a library of natten kernels: " + why);
  };
  if (std::string const trouble = trouble_with_file(path); !trouble.empty()) throw fail(trouble);
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw fail(last_error());
  void* const address = dlsym(handle, "natten_cuda_library");
  if (address == nullptr) throw fail(last_error());
  Dl_info where;
  ElfW(Sym)* symbol = nullptr;
  if (dladdr1(address, &where, reinterpret_cast<void**>(&symbol), RTLD_DL_SYMENT) == 0 || symbol == nullptr ||
      ELF64_ST_TYPE(symbol->st_info) != STT_FUNC) {
    throw fail("its symbol natten_cuda_library is no function");
  }
  cuda::Library const* const library = reinterpret_cast<cuda::Library const* (*)()>(address)();
  Mapping const mapping(address);
  if (!mapping.has(library)) throw fail("its function natten_cuda_library returns no table of its own");
  if (library->abi_version != cuda::kAbiVersion || library->arguments_bytes != int(sizeof(BackwardArguments))) {
    throw fail("it was built for interface " + std::to_string(library->abi_version) + " of " +
               std::to_string(library->arguments_bytes) + " bytes, and this natten has interface " +
               std::to_string(cuda::kAbiVersion) + " of " + std::to_string(sizeof(BackwardArguments)) +
               " bytes; build it again with this version's headers");
  }
  if (!mapping.has_text(library->toolkit)) throw fail("it does not say what built it");
  if (library->num_kernels != 0 && !mapping.has(library->kernels, library->num_kernels)) {
    throw fail("its table of " + std::to_string(library->num_kernels) + " kernels is not there");
  }
  if (library->on_host == 0 && !mapping.has_function(library->driver_version)) {
    throw fail("it cannot tell the driver's version");
  }
  for (int i = 0; i < library->num_kernels; ++i) {
    std::string const trouble = trouble_with_kernel(library->kernels[i], mapping);
    if (!trouble.empty()) throw fail("its kernel " + std::to_string(i) + " " + trouble);
  }
  return library;
}

void add(Registry& registry, std::string const& path, cuda::Library const& library) {
  registry.libraries.push_back({path, &library, library.on_host != 0 ? 0 : library.driver_version()});
  for (int i = 0; i < library.num_kernels; ++i) {
    registry.code[library.kernels[i].name] = {&library.kernels[i], &registry.libraries.back()};
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
  if (access(path.c_str(), F_OK) != 0) return;
  try {
    add(registry, path, *open_library(path));
  } catch (std::invalid_argument const& error) {
    registry.own_error = error.what();
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
  return found == registry.code.end() ? nullptr : found->second.info;
}

std::string trouble_with_driver(Kernel const& kernel) {
  Registry& registry = Registry::instance();
  std::lock_guard const lock(registry.mutex);
  LoadedLibrary const& library = *registry.code.at(kernel.name).library;
  // A driver runs what was built with any toolkit of its generation.
  constexpr int kGeneration = 1000;
  int const wanted = library.contents->runtime_version, there = library.driver_version;
  if (library.contents->on_host != 0 || there / kGeneration >= wanted / kGeneration) return "";
  auto const version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  return "was built with CUDA " + version(wanted) + ", and the GPU's driver " +
         (there == 0 ? "was not found" : "supports CUDA " + version(there) + " at most") +
         "; install a newer driver, or build natten with a toolkit that fits it";
}

std::string error_of_own_library() {
  Registry& registry = Registry::instance();
  std::lock_guard const lock(registry.mutex);
  load_own(registry);
  return registry.own_error;
}

}  // namespace natten
