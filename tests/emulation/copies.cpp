// SPDX-License-Identifier: MIT
#include "copies.hpp"

#include <cstring>
#include <utility>

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
  open_ = {};
  groups_.clear();
}

void Copies::issue(void const* source, void* destination, int bytes, bool is_present) {
  if (open_.copies.empty()) open_.history = History::create();
  open_.history.acquire_from_current();
  open_.copies.push_back({is_present ? source : nullptr, destination, bytes});
  if (are_late_) {
    open_.history.record_copy(nullptr, destination, bytes);
    std::memset(destination, 0xff, bytes);
  } else {
    land(open_.history, is_present ? source : nullptr, destination, bytes);
  }
}

void Copies::commit() {
  groups_.push_back(std::move(open_));
  open_ = {};
}

void Copies::wait(int pending) {
  while (int(groups_.size()) > pending) {
    finish(groups_.front());
    groups_.pop_front();
  }
  if (pending == 0) {
    finish(open_);
    open_ = {};
  }
}

void Copies::finish(Group& group) {
  if (group.copies.empty()) return;
  if (are_late_) {
    for (Copy const& copy : group.copies) land(group.history, copy.source, copy.destination, copy.bytes);
  }
  group.history.release_to_current();
}

void Copies::check_all_waited_for() const {
  bool all = open_.copies.empty();
  for (Group const& group : groups_) all = all && group.copies.empty();
  if (!all) throw Error("a thread exits with asynchronous copies under way");
}

}  // namespace natten::emulation
