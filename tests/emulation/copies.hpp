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
  // For ThreadSanitizer a thread of its own, begun by its first copy and joined by waiting.
  struct Group {
    std::vector<Copy> copies;
    History history;
  };

  void finish(Group& group);

  bool are_late_ = true;
  Group open_;  // not committed
  std::deque<Group> groups_;  // under way
};

}  // namespace natten::emulation
