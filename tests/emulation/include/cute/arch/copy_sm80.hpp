// SPDX-License-Identifier: MIT
// Stands before CuTe's header of this name, whose instructions are nothing at all on the CPU.
#pragma once

#include <cute/numeric/integral_constant.hpp>

#include "emulation/simt.hpp"

namespace cute {

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS {
  static_assert(sizeof(TS) == sizeof(TD) && (sizeof(TS) == 4 || sizeof(TS) == 8 || sizeof(TS) == 16));
  using SRegisters = TS[1];
  using DRegisters = TD[1];
  static void copy(TS const& source, TD& destination) {
    natten::emulation::copy_async(&source, &destination, sizeof(TS), true);
  }
};

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : SM80_CP_ASYNC_CACHEALWAYS<TS, TD> {
  static void copy(TS const& source, TD& destination, bool is_present) {
    natten::emulation::copy_async(&source, &destination, sizeof(TS), is_present);
  }
};

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL : SM80_CP_ASYNC_CACHEALWAYS<TS, TD> {
  static_assert(sizeof(TS) == 16);
};

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL : SM80_CP_ASYNC_CACHEALWAYS_ZFILL<TS, TD> {
  static_assert(sizeof(TS) == 16);
};

inline void cp_async_fence() { natten::emulation::commit_copies(); }
template <int N>
void cp_async_wait() {
  natten::emulation::wait_for_copies(N);
}
template <int N>
void cp_async_wait(Int<N>) {
  cp_async_wait<N>();
}

}  // namespace cute
