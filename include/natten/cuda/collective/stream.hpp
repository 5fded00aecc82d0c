// SPDX-License-Identifier: MIT
// The ring of streamed tiles: each is loaded while those before it are multiplied.
#pragma once

#include "natten/cuda/collective/block.hpp"

namespace natten::cuda {

// Calls body(tile, cursor, arrive) for all tiles of a block, in order. What comes of a tile comes in kSteps steps, each of
// which has a place step % kStages in the ring: the step-th call of arrive(), counted from 0, returns when all threads see
// what load(step, cursor) copied, and all that was copied before the stream; and nobody reads the step before it any more.
// In the end no copy is under way, and nobody reads what only steps before the last one read.
template <class Policy, int kSteps = 1, class State, class Load, class Body>
CUTE_DEVICE void stream_tiles(State const& state, Load const& load, Body const& body) {
  constexpr int kStages = Policy::kStages;
  auto const issue = [&](int step, Cursor const& at) {
    if (step < kSteps * state.tiles) load(step, at);
    Policy::commit();
  };
  Cursor cursor = state.first_tile();
  // Of one stage it is the step that is about to be multiplied: another cursor would spill.
  [[maybe_unused]] Cursor ahead = cursor;
  auto const issue_ahead = [&](int step) {
    issue(step, ahead);
    if (step % kSteps == kSteps - 1 && step < kSteps * state.tiles) state.next_tile(ahead);
  };
  for (int step = 0; step < kStages - 1; ++step) issue_ahead(step);
  for (int tile = 0; tile < state.tiles; ++tile) {
    int step = kSteps * tile;
    body(tile, cursor, [&] {
      if constexpr (kStages == 1) {
        __syncthreads();
        issue(step, cursor);
        Policy::template wait<0>();
        __syncthreads();
      } else {
        Policy::template wait<kStages - 2>();
        __syncthreads();
        issue_ahead(step + kStages - 1);
      }
      ++step;
    });
    state.next_tile(cursor);
  }
  // Without a tile nobody has waited yet for what was copied before.
  if (state.tiles == 0) {
    Policy::template wait<0>();
    __syncthreads();
  }
}

}  // namespace natten::cuda
