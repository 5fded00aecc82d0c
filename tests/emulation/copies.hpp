// SPDX-License-Identifier: MIT
// One thread's asynchronous copies. To see what a kernel relies on without waiting, they land as late as they may, after
// poison, or else as early as they can: a ring that is filled again too soon shows only then.
#pragma once

#include <deque>
#include <vector>

#include "fiber.hpp"

namespace natten::emulation {

class Copies {
 public:
  void start(bool are_late);  // of a thread
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

  bool are_late_ = true;
  int first_ = 0;  // number of the first of these groups
  std::deque<Group> groups_;  // under way; the last is not committed yet
  History histories_[kHistories];
};

}  // namespace natten::emulation
