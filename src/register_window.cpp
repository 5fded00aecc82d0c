// SPDX-License-Identifier: MIT
#include "register_window.hpp"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch/dispatch.hpp"
#include "dispatch/names.hpp"
#include "dispatch/planning.hpp"

namespace py = pybind11;

namespace natten {

Axis make_axis(int const* fields) {
  if (fields[5] < 0 || fields[5] >= static_cast<int>(kBoundaryNames.size())) {
    throw std::invalid_argument("boundary = " + std::to_string(fields[5]) + " must be an index of BOUNDARIES");
  }
  Axis axis;
  axis.extent = fields[0];
  axis.kernel_size = fields[1];
  axis.stride = fields[2];
  axis.dilation = fields[3];
  axis.is_causal = fields[4] != 0;
  axis.boundary = static_cast<Boundary>(fields[5]);
  axis.offset = fields[6];
  axis.query_origin = fields[7];
  axis.query_extent = fields[8];
  axis.key_origin = fields[9];
  axis.key_extent = fields[10];
  return axis;
}

namespace {

using Fields = std::vector<int>;

Axis axis_of(Fields const& fields) {
  if (fields.size() != kAxisFields) {
    throw std::invalid_argument("an axis is " + std::to_string(kAxisFields) + " integers, not " +
                                std::to_string(fields.size()));
  }
  return make_axis(fields.data());
}

Axis checked_axis(Fields const& fields) {
  Axis const axis = axis_of(fields);
  check(axis, 0);
  return axis;
}

std::vector<std::tuple<int, int, int, int>> windows(Fields const& fields) {
  Axis const axis = checked_axis(fields);
  std::vector<std::tuple<int, int, int, int>> list;
  for (int token = axis.query_origin; token < axis.query_origin + axis.query_extent; ++token) {
    Group const group = axis.group(token % axis.dilation);
    int const position = token / axis.dilation;
    Interval const window = group.window(position);
    list.emplace_back(group.index, window.begin, window.end, group.counted(position));
  }
  return list;
}

std::vector<std::tuple<int, int, int>> inverse_windows(Fields const& fields) {
  Axis const axis = checked_axis(fields);
  std::vector<std::tuple<int, int, int>> list;
  for (int token = axis.key_origin; token < axis.key_origin + axis.key_extent; ++token) {
    Group const group = axis.group(token % axis.dilation);
    Interval const queries = group.inverse(token / axis.dilation);
    list.emplace_back(group.index, queries.begin, queries.end);
  }
  return list;
}

std::tuple<int, int> valid_queries(Fields const& fields) {
  Axis const axis = axis_of(fields);
  check_numbers(axis, 0);  // the boxes are still to be found: with this
  Interval const tokens = axis.valid_queries();
  return {tokens.begin, tokens.end};
}

std::int64_t axis_pairs(Fields const& fields) {
  Axis const axis = checked_axis(fields);
  std::int64_t pairs = 0;
  for_each_kind_of_group(axis, [&](Group const& group, int count) { pairs += count * attended_pairs(group); });
  return pairs;
}

// The first and the last token of the grid that queries attend to, whether the key tensor holds them or not; (0, -1) where there are
// no queries.
std::pair<int, int> attended_tokens(Fields const& fields) {
  Axis axis = axis_of(fields);
  axis.key_origin = 0;
  axis.key_extent = axis.extent;
  check(axis, 0);
  std::pair<int, int> tokens{0, -1};
  for_each_kind_of_group(axis, [&](Group const& group, int count) {
    if (group.queries.empty()) return;
    int const first = group.window(group.queries.begin).begin * axis.dilation + group.index;
    int const last = (group.window(group.queries.end - 1).end - 1) * axis.dilation + group.index + count - 1;
    bool const is_first = tokens.second < 0;
    tokens = {is_first ? first : min(tokens.first, first), max(tokens.second, last)};
  });
  return tokens;
}

void require_positive(char const* name, int tile) {
  if (tile < 1) throw std::invalid_argument(std::string(name) + " = " + std::to_string(tile) + " must be positive");
}

std::vector<std::tuple<int, int, int, int, int, int, int>> tile_boxes(Fields const& fields, int tile, bool of_keys) {
  require_positive("tile", tile);
  Axis const axis = checked_axis(fields);
  std::vector<std::tuple<int, int, int, int, int, int, int>> list;
  for (int g = 0; g < axis.groups(); ++g) {
    Group const group = axis.group(g);
    Interval const tokens = of_keys ? group.keys : group.queries;
    for (int p = tokens.begin; p < tokens.end; p += tile) {
      Interval const own{p, min(p + tile, tokens.end)};
      Interval const box = of_keys ? group.queries_of(own) : group.keys_of(own);
      Interval const interior = of_keys ? group.interior_queries_of(own) : group.interior_keys_of(own);
      list.emplace_back(g, own.begin, own.end, box.begin, box.end, interior.begin, interior.end);
    }
  }
  return list;
}

std::int64_t axis_tiles(Fields const& fields, int query_tile, int key_tile) {
  require_positive("query_tile", query_tile);
  require_positive("key_tile", key_tile);
  Axis const axis = checked_axis(fields);
  std::int64_t tiles = 0;
  for (int g = 0; g < axis.groups(); ++g) tiles += visited_tiles(axis.group(g), query_tile, key_tile);
  return tiles;
}

}  // namespace

void register_window(py::module_& module) {
  module.attr("AXIS_FIELDS") = py::make_tuple("extent", "kernel_size", "stride", "dilation", "is_causal", "boundary",
                                              "offset", "query_origin", "query_extent", "key_origin", "key_extent");
  module.def("windows", &windows, py::arg("axis"));
  module.def("inverse_windows", &inverse_windows, py::arg("axis"));
  module.def("valid_queries", &valid_queries, py::arg("axis"));
  module.def("attended_tokens", &attended_tokens, py::arg("axis"));
  module.def("attended_pairs", &axis_pairs, py::arg("axis"));
  module.def("tile_boxes", &tile_boxes, py::arg("axis"), py::arg("tile"), py::arg("of_keys") = false);
  module.def("visited_tiles", &axis_tiles, py::arg("axis"), py::arg("query_tile"), py::arg("key_tile"));
}

}  // namespace natten
