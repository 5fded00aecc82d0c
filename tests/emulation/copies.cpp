// SPDX-License-Identifier: MIT
#include "copies.hpp"

#include <algorithm>
#include <cstdint>

#include "emulation/simt.hpp"

namespace natten::emulation {
namespace {

using Word = std::uint32_t __attribute__((may_alias));
constexpr std::uint32_t kPoison = 0xffffffff;  // NaN in all types

// 4, 8 or 16 bytes, or none of a source that is not there. Not by memcpy and memset: ThreadSanitizer takes their calls for
// accesses by the thread that runs, whereas a copy is on its own, with a history of its own.
void move(void const* source, void* destination, int bytes, std::uint32_t otherwise) {
  auto const* from = static_cast<Word const volatile*>(source);
  auto* to = static_cast<Word volatile*>(destination);
  for (int i = 0; i < bytes / 4; ++i) to[i] = source != nullptr ? from[i] : otherwise;
}

void land(History& history, void const* source, void* destination, int bytes) {
  history.record_copy(source, destination, bytes);
  move(source, destination, bytes, 0);
}

}  // namespace

void UnderWay::start(char const* shared, int bytes) {
  shared_ = shared;
  words_.assign(bytes / sizeof(Word) + 1, false);
}

bool UnderWay::touches(void const* address, int bytes) const {
  auto const begin = words_.begin() + (static_cast<char const*>(address) - shared_) / sizeof(Word);
  return std::find(begin, begin + (bytes + sizeof(Word) - 1) / sizeof(Word), true) !=
         begin + (bytes + sizeof(Word) - 1) / sizeof(Word);
}

void UnderWay::set(void const* address, int bytes, bool is_under_way) {
  std::fill_n(words_.begin() + (static_cast<char const*>(address) - shared_) / sizeof(Word), bytes / sizeof(Word),
              is_under_way);
}

void Copies::start(bool are_late, UnderWay& under_way) {
  are_late_ = are_late;
  under_way_ = &under_way;
  first_ = 0;
  groups_.assign(1, {});
}

void Copies::clear() { groups_ = {}; }

void Copies::issue(void const* source, void* destination, int bytes, bool is_present) {
  History& history = this->history(first_ + int(groups_.size()) - 1);
  if (!history) history = History::create();
  history.acquire_from_current();
  groups_.back().push_back({is_present ? source : nullptr, destination, bytes});
  under_way_->set(destination, bytes, true);
  if (are_late_) {
    history.record_copy(nullptr, destination, bytes);
    move(nullptr, destination, bytes, kPoison);
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
    for (Copy const& copy : groups_.front()) finish(history, copy);
    history.release_to_current();
  }
  groups_.pop_front();
  ++first_;
}

void Copies::finish(History& history, Copy const& copy) {
  auto const* const words = static_cast<Word const volatile*>(copy.destination);
  auto const* const source = static_cast<Word const volatile*>(copy.source);
  for (int i = 0; i < copy.bytes / int(sizeof(Word)); ++i) {
    std::uint32_t const expected = are_late_ ? kPoison : source != nullptr ? source[i] : 0;
    if (words[i] != expected) throw Error("a write to where an asynchronous copy was under way");
  }
  if (are_late_) land(history, copy.source, copy.destination, copy.bytes);
  under_way_->set(copy.destination, copy.bytes, false);
}

void Copies::check_all_waited_for() const {
  for (Group const& group : groups_) {
    if (!group.empty()) throw Error("a thread exits with asynchronous copies under way");
  }
}

}  // namespace natten::emulation
