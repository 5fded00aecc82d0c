// SPDX-License-Identifier: MIT
// A look at a file before it is loaded: dlopen hangs on a pipe, and what lies behind the end of a truncated library is a
// SIGBUS for whoever touches it. And a look at where a library lies that was loaded, as a pointer that it hands out may lead
// anywhere.
#pragma once

#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace natten {

// Why the file cannot be a shared library of this machine, as the end of a sentence about it; empty: it looks like one.
inline std::string trouble_with_file(std::string const& path) {
  struct File {
    int descriptor;
    ~File() {
      if (descriptor >= 0) close(descriptor);
    }
    bool read(void* to, std::uint64_t bytes, std::uint64_t offset) const {
      return pread(descriptor, to, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes);
    }
  };
  // Without O_NONBLOCK a pipe would wait for its writer.
  File const file{open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)};
  struct stat status{};
  if (file.descriptor < 0 || fstat(file.descriptor, &status) != 0) return std::strerror(errno);
  if (!S_ISREG(status.st_mode)) return "it is no regular file";
  auto const size = static_cast<std::uint64_t>(status.st_size);

  Elf64_Ehdr own{}, header{};
  File const self{open("/proc/self/exe", O_RDONLY | O_CLOEXEC)};
  if (!file.read(&header, sizeof(header), 0) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
      header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_type != ET_DYN) {
    return "it is no 64-bit shared library (ELF)";
  }
  bool const is_known = self.descriptor >= 0 && self.read(&own, sizeof(own), 0);
  if (is_known && (header.e_machine != own.e_machine || header.e_ident[EI_DATA] != own.e_ident[EI_DATA])) {
    return "it is for another machine (ELF machine " + std::to_string(header.e_machine) + ", and this is " +
           std::to_string(own.e_machine) + ")";
  }
  auto const is_within = [&](std::uint64_t offset, std::uint64_t bytes) {
    return offset <= size && bytes <= size - offset;
  };
  bool is_whole = true;
  if (header.e_phentsize != sizeof(Elf64_Phdr) || header.e_phnum == 0) return "it is a damaged shared library";
  std::vector<Elf64_Phdr> segments(header.e_phnum);
  std::uint64_t const segment_bytes = segments.size() * sizeof(Elf64_Phdr);
  is_whole = is_within(header.e_phoff, segment_bytes) && file.read(segments.data(), segment_bytes, header.e_phoff);
  if (is_whole) {
    for (Elf64_Phdr const& segment : segments) is_whole = is_whole && is_within(segment.p_offset, segment.p_filesz);
  }
  if (is_whole && header.e_shoff != 0 && header.e_shentsize == sizeof(Elf64_Shdr)) {  // a stripped file may have none
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    std::uint64_t const section_bytes = sections.size() * sizeof(Elf64_Shdr);
    is_whole = is_within(header.e_shoff, section_bytes) && file.read(sections.data(), section_bytes, header.e_shoff);
    if (is_whole) {
      for (Elf64_Shdr const& section : sections) {
        is_whole = is_whole && (section.sh_type == SHT_NOBITS || is_within(section.sh_offset, section.sh_size));
      }
    }
  }
  return is_whole ? "" : "it is truncated: " + std::to_string(size) + " bytes are fewer than its headers tell of";
}

// The segments of the loaded library that an address is in. Nothing of what is asked about is touched but what is theirs.
class Mapping {
 public:
  explicit Mapping(void const* address) : address_(reinterpret_cast<std::uintptr_t>(address)) {
    dl_iterate_phdr(&Mapping::look_at, this);
  }

  // Whether so many objects can be read from there.
  template <class T>
  bool has(T const* objects, int count = 1) const {
    auto const begin = reinterpret_cast<std::uintptr_t>(objects);
    return count >= 0 && begin % alignof(T) == 0 && bytes_from(begin, PF_R) / sizeof(T) >= std::uintptr_t(count);
  }
  // Whether this is a text that ends.
  bool has_text(char const* text) const {
    std::uintptr_t const bytes = bytes_from(reinterpret_cast<std::uintptr_t>(text), PF_R);
    return bytes > 0 && std::memchr(text, 0, bytes) != nullptr;
  }
  // Whether it can be called.
  template <class Result, class... Parameters>
  bool has_function(Result (*function)(Parameters...)) const {
    return bytes_from(reinterpret_cast<std::uintptr_t>(function), PF_X) > 0;
  }

 private:
  struct Segment {
    std::uintptr_t begin, end;
    std::uint32_t flags;
  };

  static int look_at(dl_phdr_info* object, std::size_t, void* mapping) {
    auto& self = *static_cast<Mapping*>(mapping);
    std::vector<Segment> segments;
    bool is_there = false;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
      ElfW(Phdr) const& header = object->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      std::uintptr_t const begin = object->dlpi_addr + header.p_vaddr;
      segments.push_back({begin, begin + header.p_memsz, header.p_flags});
      is_there = is_there || (begin <= self.address_ && self.address_ < segments.back().end);
    }
    if (is_there) self.segments_ = std::move(segments);
    return is_there;
  }

  // From an address to the end of its segment; 0 where there is none that allows what `flag` says.
  std::uintptr_t bytes_from(std::uintptr_t address, std::uint32_t flag) const {
    for (Segment const& segment : segments_) {
      bool const is_there = segment.begin <= address && address < segment.end;
      if (is_there) return (segment.flags & flag) != 0 ? segment.end - address : 0;
    }
    return 0;
  }

  std::uintptr_t address_;
  std::vector<Segment> segments_;
};

}  // namespace natten
