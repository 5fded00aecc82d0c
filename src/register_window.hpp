// SPDX-License-Identifier: MIT
#pragma once

#include <pybind11/pybind11.h>

#include "natten/window.hpp"

namespace natten {

constexpr int kAxisFields = 11;

// From kAxisFields integers, in the order of Axis.
Axis make_axis(int const* fields);

// window.hpp for Python: AXIS_FIELDS, windows, inverse_windows, valid_queries, attended_pairs, tile_boxes, visited_tiles.
void register_window(pybind11::module_& module);

}  // namespace natten
