// SPDX-License-Identifier: MIT
// What enumerators are called outside of C++.
#pragma once

#include <array>
#include <string>

#include "dispatch/table.hpp"

namespace natten {

// In the order of the enumerators.
inline constexpr std::array<char const*, 4> kDTypeNames = {"float64", "float32", "bfloat16", "float16"};
inline constexpr std::array<char const*, 4> kBoundaryNames = {"shift", "mask", "zeros", "valid"};
inline constexpr std::array<char const*, 6> kOpNames = {"forward", "backward",      "qk",
                                                        "av",      "av_transposed", "rpb_gradient"};

inline std::string dtype_name(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }
inline std::string op_name(Op op) { return kOpNames[static_cast<int>(op)]; }

}  // namespace natten
