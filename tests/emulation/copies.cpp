// SPDX-License-Identifier: MIT
#include "copies.hpp"

#include <cstring>

#include "emulation/simt.hpp"

namespace natten::emulation {
namespace {

void land(History& history, void const* source, void* destination, int bytes) {
  history.record_copy(source, destination, bytes);
  if (source != nullptr) std::memcpy(destination, source, bytes);
  else std::memset(destination, 0, bytes);
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
    std::memset(destination, 0xff, bytes);
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
