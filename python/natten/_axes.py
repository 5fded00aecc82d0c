# SPDX-License-Identifier: MIT
"""The axes of a grid: whatever is said once or per axis, normalised and checked.

No window is computed here: whatever depends on one asks the compiled core.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from natten import _C
from natten._errors import reject
from natten.types import Boundary

# Not as strings: typing.get_type_hints evaluates them where the annotated function is.
IntPerAxis: TypeAlias = int | Sequence[int]
BoolPerAxis: TypeAlias = bool | Sequence[bool]
BoundaryPerAxis: TypeAlias = Boundary | Sequence[Boundary]

AXIS_INTS = len(_C.AXIS_FIELDS)
_BOUNDARY_IDS = {name: index for index, name in enumerate(_C.BOUNDARIES)}
_SHIFT = _BOUNDARY_IDS["shift"]
VALID = _BOUNDARY_IDS["valid"]
# The core counts positions in 32 bits, and a window may reach beyond both ends of its grid.
_LARGEST = 2**29


class Axis(NamedTuple):
    """One axis of the grid, in the order and the meaning of natten::Axis."""

    extent: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: int = 0
    boundary: int = _SHIFT
    offset: int = 0
    query_origin: int = 0
    query_extent: int = 1
    key_origin: int = 0
    key_extent: int = 1


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not (
        isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")
    ):
        reject(name, repr(value), "an integer")
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # a SymInt is an int to everybody but the type checker
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """`value`, which must be a number."""
    if isinstance(value, bool) or not (
        isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or hasattr(value, "__float__")
    ):
        reject(name, repr(value), "a number")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        reject(name, repr(value), "True or False")
    return value


def _boundary(name: str, value: Any) -> int:
    if not isinstance(value, str) or value not in _BOUNDARY_IDS:
        reject(name, repr(value), f"one of {', '.join(map(repr, _BOUNDARY_IDS))}")
    return _BOUNDARY_IDS[value]


def per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """`value`, a scalar for all axes or one value per axis, as one value per axis."""
    if isinstance(value, (tuple, list)) or (
        isinstance(value, Iterable) and not isinstance(value, (str, Tensor))
    ):
        values = tuple(value)
    else:
        return (value,) * rank
    if len(values) != rank:
        reject(name, value, f"one value, or {rank} (one per axis of the grid)")
    return values


def integers(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """`value`, one integer or one per axis, as one per axis."""
    values = per_axis(name, value, rank)
    return tuple(_integer(f"{name}[{i}]", v) for i, v in enumerate(values))


TILE_ARGUMENTS = (
    "q_tile_shape",
    "kv_tile_shape",
    "backward_q_tile_shape",
    "backward_kv_tile_shape",
)


def normalize_tile_shapes(shapes: tuple[Any, ...], rank: int) -> tuple[int, ...]:
    """The values of `TILE_ARGUMENTS` in one row, `rank` numbers each; zeros for those that are None."""
    flat: list[int] = []
    for name, shape in zip(TILE_ARGUMENTS, shapes, strict=True):
        sides = (0,) * rank if shape is None else integers(name, shape, rank)
        if shape is not None and min(sides) < 1:
            reject(name, shape, "at least 1 token on every axis")
        flat += sides
    return tuple(flat)


def _valid_queries(*axis: int) -> tuple[int, int]:
    return _C.valid_queries(axis)


def _attended_tokens(*axis: int) -> tuple[int, int]:
    """The first and the last token of the whole axis that queries of this one attend to, or (0, -1)."""
    whole = Axis(*axis)._replace(key_origin=0, key_extent=axis[0])
    windows = [(g, begin, end) for g, begin, end, _ in _C.windows(whole) if end > begin]
    if not windows:
        return 0, -1
    return (
        min(begin * whole.dilation + g for g, begin, _ in windows),
        max((end - 1) * whole.dilation + g for g, _, end in windows),
    )


# torch.compile cannot trace into the core; it may call it, though, once the numbers are constants.
_valid_queries._dynamo_marked_constant = True  # type: ignore[attr-defined]
_attended_tokens._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _constants(axis: Axis) -> tuple[int, ...]:
    """The numbers of `axis`; under torch.compile, `index` specialises symbolic ones."""
    return tuple(operator.index(number) for number in axis)


def _check_axis(i: int, axis: Axis) -> None:
    extent, kernel_size, dilation = axis.extent, axis.kernel_size, axis.dilation
    if kernel_size < 1:
        reject(f"kernel_size[{i}]", kernel_size, "at least 1, or -1 for the whole axis")
    if dilation < 1:
        reject(f"dilation[{i}]", dilation, "at least 1")
    if not 1 <= axis.stride <= kernel_size:
        reject(
            f"stride[{i}]",
            axis.stride,
            f"1 to {kernel_size} (kernel_size[{i}])",
            "tokens would go unattended between windows",
        )
    if not 0 <= axis.offset < axis.stride:
        reject(f"offset[{i}]", axis.offset, f"0 to {axis.stride - 1} (stride[{i}] - 1)")
    if axis.boundary == _SHIFT and kernel_size * dilation > extent:
        reject(
            f"kernel_size[{i}] * dilation[{i}]",
            f"{kernel_size} * {dilation}",
            f"at most {extent}, the extent of axis {i}",
            "use a smaller window, or another boundary than 'shift'",
        )
    if kernel_size > _LARGEST or dilation > _LARGEST or extent > _LARGEST:
        reject(
            f"kernel_size[{i}], dilation[{i}] or extent[{i}]", "too large", f"at most {_LARGEST}"
        )
    if axis.boundary == VALID and (axis.stride != 1 or axis.is_causal):
        reject(
            f"boundary[{i}]",
            "'valid'",
            "stride 1 and is_causal False with it",
            "use another boundary",
        )


def _check_box(i: int, what: str, extent: int, origin: int, size: int) -> None:
    if origin < 0 or origin + size > extent:
        reject(
            f"{what}_origin[{i}]",
            origin,
            f"0 to {extent - size}, so that the {what}'s {size} tokens lie inside grid[{i}] = {extent}",
        )


def normalize_axes(
    rank: int,
    query_extents: tuple[int, ...],
    key_extents: tuple[int, ...],
    grid: IntPerAxis | None,
    query_origins: tuple[int, ...],
    key_origins: tuple[int, ...],
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    boundary: BoundaryPerAxis,
    offset: IntPerAxis,
) -> tuple[Axis, ...]:
    """The axes that these arguments mean; `query_extents` and `key_extents` are those of the tensors, or boxes."""
    extents = query_extents if grid is None else integers("grid", grid, rank)
    kernel_sizes = integers("kernel_size", kernel_size, rank)
    strides = integers("stride", 1 if stride is None else stride, rank)
    dilations = integers("dilation", 1 if dilation is None else dilation, rank)
    offsets = integers("offset", offset, rank)
    causal = per_axis("is_causal", False if is_causal is None else is_causal, rank)
    boundaries = per_axis("boundary", boundary, rank)

    axes: list[Axis] = []
    for i in range(rank):
        axis = Axis(
            extent=extents[i],
            kernel_size=kernel_sizes[i],
            stride=strides[i],
            dilation=dilations[i],
            is_causal=int(boolean(f"is_causal[{i}]", causal[i])),
            boundary=_boundary(f"boundary[{i}]", boundaries[i]),
            offset=offsets[i],
            query_origin=query_origins[i],
            query_extent=query_extents[i],
            key_origin=key_origins[i],
            key_extent=key_extents[i],
        )
        if axis.kernel_size == -1:
            if axis.dilation != 1:
                reject(
                    f"dilation[{i}]", axis.dilation, f"1 with kernel_size[{i}] = -1, the whole axis"
                )
            axis = axis._replace(kernel_size=axis.extent, boundary=_SHIFT)
        _check_axis(i, axis)
        if grid is not None:
            _check_box(i, "query", axis.extent, axis.query_origin, axis.query_extent)
            _check_box(i, "key", axis.extent, axis.key_origin, axis.key_extent)
        axes.append(_only_queries(i, axis) if axis.boundary == VALID else axis)
        if key_extents[i] != axis.extent:
            _check_keys(i, axes[i])
    return tuple(axes)


def _only_queries(i: int, axis: Axis) -> Axis:
    """`axis` with its query box narrowed to the tokens that have a whole window."""
    whole = axis._replace(query_origin=0, query_extent=axis.extent)
    begin, end = _valid_queries(*_constants(whole))
    if begin == end:
        reject(
            f"kernel_size[{i}], dilation[{i}]",
            f"{axis.kernel_size}, {axis.dilation}",
            f"a window that fits into the {axis.extent} tokens of axis {i}",
            "boundary 'valid' leaves no query here",
        )
    begin, end = _valid_queries(*_constants(axis))
    return axis._replace(query_origin=begin, query_extent=end - begin)


def _check_keys(i: int, axis: Axis) -> None:
    first, last = _attended_tokens(*_constants(axis))
    if first <= last and (first < axis.key_origin or last >= axis.key_origin + axis.key_extent):
        reject(
            f"key_origin[{i}]",
            f"{axis.key_origin} with {axis.key_extent} tokens",
            f"a key box that holds tokens {first} to {last} of the grid",
            "the windows of the queries reach that far",
        )
