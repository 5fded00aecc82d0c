// SPDX-License-Identifier: MIT
// Tiles between global and shared memory, token by token: neighbours in a box are not neighbours in memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "natten/cuda/collective/tile.hpp"

namespace natten::cuda {

// How a vector of 16 bytes comes into shared memory; zeros where `present` is false.
struct AsynchronousCopy {
  static constexpr int kUnrolledCopies = 8;
  CUTE_DEVICE static void copy(uint128_t const* source, uint128_t* destination, bool present) {
    SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(*source, *destination, present);
  }
  CUTE_DEVICE static void commit() { cp_async_fence(); }
  template <int kPending>
  CUTE_DEVICE static void wait() {
    cp_async_wait<kPending>();
  }
};

struct SynchronousCopy {
  static constexpr int kUnrolledCopies = 4;  // each holds four registers from its load to its store
  CUTE_DEVICE static void copy(uint128_t const* source, uint128_t* destination, bool present) {
    *destination = present ? *source : uint128_t{};
  }
  CUTE_DEVICE static void commit() {}
  template <int kPending>
  CUTE_DEVICE static void wait() {}
};

// A run of tokens: a box of positions, from which tiles of shape `shape` are taken.
struct TokenBox {
  TileShape shape;
  Interval box[kMaxRank];
};

// Fills a shared tile with the tokens of `tokens` from `origin` on: those beyond the box, and columns beyond
// `head_dim`, are zeros.
template <class Tile, class Copy, int kThreads, class Element, int kRows, int kColumns>
CUTE_DEVICE void load_tile(TokenView const& view, TokenBox const& tokens, int const (&origin)[kMaxRank], int head_dim,
                           bool vectors, char* shared, int thread) {
  auto tile = Tile::tensor(shared);
  constexpr int kVectors = kColumns / Tile::kVector;  // in a row
#pragma unroll(Copy::kUnrolledCopies)
  for (int i = 0; i < ceil_div(kRows * kVectors, kThreads); ++i) {
    int const index = thread + i * kThreads;
    if (kRows * kVectors % kThreads != 0 && index >= kRows * kVectors) break;
    int const row = index / kVectors;
    int const column = index % kVectors * Tile::kVector;
    int p[kMaxRank];
    bool present = true;
    for (int a = 0; a < kMaxRank; ++a) {
      p[a] = origin[a] + tokens.shape.at(row, a);
      present = present && p[a] < tokens.box[a].end;
    }
    // An address is formed for every copy, also for one that reads nothing: the box's first token is always there.
    Element const* token = present ? view.token<Element const>(p[0], p[1], p[2])
                                   : view.token<Element const>(origin[0], origin[1], origin[2]);
    Element* destination = &tile(row, column);
    if (vectors) {
      bool const inside = column < head_dim;
      Copy::copy(reinterpret_cast<uint128_t const*>(token + (inside ? column : 0)),
                 reinterpret_cast<uint128_t*>(destination), present && inside);
    } else {
      for (int e = 0; e < Tile::kVector; ++e) {
        destination[e] = present && column + e < head_dim ? token[column + e] : Element(0);
      }
    }
  }
}

// The way back, of a tile that all threads see.
template <class Tile, int kThreads, class Element, int kRows, int kColumns>
CUTE_DEVICE void store_tile(char* shared, TokenView const& view, TokenBox const& tokens, int const (&origin)[kMaxRank],
                            int head_dim, bool vectors, int thread) {
  auto tile = Tile::tensor(shared);
  constexpr int kVectors = kColumns / Tile::kVector;
  CUTE_UNROLL
  for (int i = 0; i < ceil_div(kRows * kVectors, kThreads); ++i) {
    int const index = thread + i * kThreads;
    if (kRows * kVectors % kThreads != 0 && index >= kRows * kVectors) break;
    int const row = index / kVectors;
    int const column = index % kVectors * Tile::kVector;
    int p[kMaxRank];
    bool present = true;
    for (int a = 0; a < kMaxRank; ++a) {
      p[a] = origin[a] + tokens.shape.at(row, a);
      present = present && p[a] < tokens.box[a].end;
    }
    if (!present || column >= head_dim) continue;
    Element* token = view.token<Element>(p[0], p[1], p[2]) + column;
    Element const* source = &tile(row, column);
    if (vectors) {
      *reinterpret_cast<uint128_t*>(token) = *reinterpret_cast<uint128_t const*>(source);
    } else {
      for (int e = 0; e < Tile::kVector && column + e < head_dim; ++e) token[e] = source[e];
    }
  }
}

}  // namespace natten::cuda
