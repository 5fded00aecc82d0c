// SPDX-License-Identifier: MIT
// One thread's asynchronous copies. To see what a kernel relies on without waiting, they land as late as they may, after
// poison, or else as early as they can: a ring that is filled again too soon shows only then. Until the thread has waited
// for a copy, nobody may touch where it goes: a write there is found by the wait, if not before.
#pragma once

#include <deque>
#include <vector>

#include "fiber.hpp"

namespace natten::emulation {

// The words of a block's shared memory that copies are under way to.
class UnderWay {
 public:
  void start(char const* shared, int bytes);
  bool touches(void const* address, int bytes) const;
  void set(void const* address, int bytes, bool is_under_way);

 private:
  char const* shared_ = nullptr;
  std::vector<char> words_;
};

class Copies {
 public:
  void start(bool are_late, UnderWay& under_way);  // of a thread
  void clear();  // after its end
  void issue(void const* source, void* destination, int bytes, bool is_present);
  void commit();
  void wait(int pending);
  void check_all_waited_for() const;

 private:
  struct Copy {
    void const* source;  // null: zeros
    void* destination;
    int bytes;
  };
  using Group = std::vector<Copy>;

  // For ThreadSanitizer a group is a thread of its own, which its copies are issued to and which waiting joins. They take
  // turns, as making one costs more than a copy; no kernel has as many groups under way.
  static constexpr int kHistories = 8;
  History& history(int group) { return histories_[group % kHistories]; }

  void finish_first();
  void finish(History& history, Copy const& copy);

  bool are_late_ = true;
  UnderWay* under_way_ = nullptr;
  int first_ = 0;  // number of the first of these groups
  std::deque<Group> groups_;  // under way; the last is not committed yet
  History histories_[kHistories];
};

}  // namespace natten::emulation
