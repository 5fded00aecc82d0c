// SPDX-License-Identifier: MIT
#include "copies.hpp"

#include <cstdint>

#include "emulation/simt.hpp"

namespace natten::emulation {
namespace {

// 4, 8 or 16 bytes, or none of a source that is not there. Not by memcpy and memset: ThreadSanitizer takes their calls for
// accesses by the thread that runs, whereas a copy is on its own, with a history of its own.
void move(void const* source, void* destination, int bytes, std::uint32_t otherwise) {
  using Word = std::uint32_t __attribute__((may_alias));
  auto const* from = static_cast<Word const volatile*>(source);
  auto* to = static_cast<Word volatile*>(destination);
  for (int i = 0; i < bytes / 4; ++i) to[i] = source != nullptr ? from[i] : otherwise;
}

void land(History& history, void const* source, void* destination, int bytes) {
  history.record_copy(source, destination, bytes);
  move(source, destination, bytes, 0);
}

}  // namespace

void Copies::start(bool are_late) {
  are_late_ = are_late;
  first_ = 0;
  groups_.assign(1, {});
}

void Copies::clear() { groups_ = {}; }

void Copies::issue(void const* source, void* destination, int bytes, bool is_present) {
  History& history = this->history(first_ + int(groups_.size()) - 1);
  if (!history) history = History::create();
  history.acquire_from_current();
  groups_.back().push_back({is_present ? source : nullptr, destination, bytes});
  if (are_late_) {
    history.record_copy(nullptr, destination, bytes);
    constexpr std::uint32_t kNan = 0xffffffff;  // in all types
    move(nullptr, destination, bytes, kNan);
  } else {
    land(history, is_present ? source : nullptr, destination, bytes);
  }
}

void Copies::commit() { groups_.emplace_back(); }

void Copies::wait(int pending) {
  if (pending == 0) commit();
  while (int(groups_.size()) > pending + 1) finish_first();
}

void Copies::finish_first() {
  if (!groups_.front().empty()) {
    History& history = this->history(first_);
    if (are_late_) {
      for (Copy const& copy : groups_.front()) land(history, copy.source, copy.destination, copy.bytes);
    }
    history.release_to_current();
  }
  groups_.pop_front();
  ++first_;
}

void Copies::check_all_waited_for() const {
  for (Group const& group : groups_) {
    if (!group.empty()) throw Error("a thread exits with asynchronous copies under way");
  }
}

}  // namespace natten::emulation
