// SPDX-License-Identifier: MIT
// A look at a file before it is loaded: dlopen hangs on a pipe, and what lies behind the end of a truncated library is a
// SIGBUS for whoever touches it.
#pragma once

#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
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

}  // namespace natten
