// SPDX-License-Identifier: MIT
// One attention problem, as plain numbers: what dispatch looks at, and the part of a kernel's arguments that is not
// a pointer.
#pragma once

#include "natten/window.hpp"

namespace natten {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int kMaxRank = 3;

// The best shape of a tile of 4, 8 and 16 tokens (the lanes of a vector), for query tiles and for key tiles.
struct TileTable {
  static constexpr int kSmallest = 4;
  static constexpr int kSizes = 3;
  int shape[2][kSizes][kMaxRank] = {};
  bool queries_slide = false;  // whether 16 queries in a row, whose windows slide, cost no more than any such box
};

// A thread block of a GPU owns a box of tokens and streams boxes of the other side past it. Both are factorisations, axis
// by axis, of the numbers of tokens that its kernel was compiled for.
struct TileShapes {
  int own[kMaxRank] = {1, 1, 1};
  int streamed[kMaxRank] = {1, 1, 1};
};

struct Problem {
  DType dtype = DType::kFloat32;
  int rank = 1;          // of the grid, as the user sees it
  Axis axes[kMaxRank];   // outermost first; a grid of lower rank has leading axes of extent 1
  std::int64_t batch = 1;
  int heads = 1;         // of the query
  int heads_kv = 1;      // divides heads: query head h reads key head h / (heads / heads_kv)
  int head_dim = 1;      // of query and key
  int head_dim_value = 1;
  int additional_keys = 0;  // dense keys behind the window, attended by every query
  bool has_rpb = false;
  double scale = 1.0;
  bool allow_tf32 = false;  // float32 products on a GPU may round their factors
  TileTable tiles;  // filled by choose_tiles (tiling.hpp)

  NATTEN_INLINE int group_size() const { return heads / heads_kv; }
};

}  // namespace natten
