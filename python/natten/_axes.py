# SPDX-License-Identifier: MIT
"""The axes of a grid: whatever is said once or per axis, normalised and checked.

No window is computed here: whatever depends on one asks the compiled core.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
_MASK = _BOUNDARY_IDS["mask"]
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


def _is_boolean(value: Any) -> bool:
    """Whether it is a bool of Python, numpy or torch, or an array or tensor of them."""
    if isinstance(value, (bool, torch.SymBool)):
        return True
    # torch.compile cannot say of what type a number of numpy is.
    if torch.compiler.is_compiling() and not isinstance(value, Tensor):
        return False
    return str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"


def integer(name: str, value: Any) -> int:
    """`value`, which must be an integer: of Python, numpy or torch, or a tensor of one."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a SymInt is an int to everybody but the type checker
    found = None
    if not _is_boolean(value):
        # Tensors of more numbers raise the one, tensors that have none the other.
        with suppress(TypeError, RuntimeError):
            found = operator.index(value)
    if found is None:
        reject(name, repr(value), "an integer")
    return found


def number(name: str, value: Any) -> float:
    """`value`, which must be a number."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(
        value, bool
    ):
        return float(value)  # torch.compile does not let symbolic ones be asked for a shape
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        reject(name, repr(value), "a number")
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        reject(f"{name}.shape", tuple(shape), "(): one number")
    return float(value.item() if shape else value)


def boolean(name: str, value: Any) -> bool:
    """`value`, which must be True or False: of Python, numpy or torch."""
    if isinstance(value, (bool, torch.SymBool)):
        # Where it depends on a size, torch.compile makes a constant of it by a branch, and by nothing else.
        return True if value else False  # noqa: SIM210
    if not _is_boolean(value) or getattr(value, "ndim", 0) != 0:
        reject(name, repr(value), "True or False")
    return bool(value)


def _boundary(name: str, value: Any) -> int:
    if not isinstance(value, str) or value not in _BOUNDARY_IDS:
        reject(name, repr(value), f"one of {', '.join(map(repr, _BOUNDARY_IDS))}")
    return _BOUNDARY_IDS[value]


def per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """`value`, a scalar for all axes or one value per axis, as one value per axis."""
    if isinstance(value, (int, str, torch.SymInt, torch.SymBool)):
        return (value,) * rank
    dims = getattr(value, "ndim", None)  # of an array or tensor
    if isinstance(value, (tuple, list)) or (
        isinstance(value, Sequence) and not isinstance(value, bytes)
    ):
        values = tuple(value)
    elif dims == 1:
        values = tuple(value.tolist())
    elif dims == 0 or isinstance(value, bytes) or not isinstance(value, Iterable):
        return (value,) * rank
    else:  # it has no order, can be read but once, or is a table
        reject(name, value, f"one value, or a tuple or list of {rank} (one per axis of the grid)")
    if len(values) != rank:
        reject(name, value, f"one value, or {rank} (one per axis of the grid)")
    return values


def integers(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """`value`, one integer or one per axis, as one per axis."""
    values = per_axis(name, value, rank)
    return tuple(integer(f"{name}[{i}]", v) for i, v in enumerate(values))


def booleans(name: str, value: Any, rank: int) -> tuple[bool, ...]:
    """`value`, True or False or one of them per axis, as one per axis."""
    values = per_axis(name, value, rank)
    return tuple(boolean(f"{name}[{i}]", v) for i, v in enumerate(values))


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


# torch.compile cannot trace into the core; it may call it, though, once the numbers are constants.
_valid_queries._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _constants(axis: Axis) -> tuple[int, ...]:
    """The numbers of `axis`; under torch.compile, `index` specialises symbolic ones."""
    return tuple(operator.index(number) for number in axis)


class Window(NamedTuple):
    """What is said about the windows of one axis, of whatever extent; `boundary` as in `Axis`."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    boundary: int
    offset: int


class OtherLayout(NamedTuple):
    """What the tensors would be if their heads were where they are not expected.

    Tensors of both layouts have as many dims, and those of the wrong one are noticed, if at all, by sizes that do not fit.
    """

    extents: tuple[int, ...]  # of the grid
    remedy: str

    def hint(self, windows: tuple[Window, ...]) -> str:
        """The remedy if the windows fit that grid. Asked for in errors only: under torch.compile, sizes are symbolic."""
        for window, extent in zip(windows, self.extents, strict=True):
            if window.kernel_size * window.dilation > extent:
                return ""
        return self.remedy


def normalize_windows(
    rank: int,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    boundary: BoundaryPerAxis,
    offset: IntPerAxis,
) -> tuple[Window, ...]:
    """The windows that these arguments mean, one per axis."""
    boundaries = per_axis("boundary", boundary, rank)
    windows = tuple(
        Window(*window)
        for window in zip(
            integers("kernel_size", kernel_size, rank),
            integers("stride", 1 if stride is None else stride, rank),
            integers("dilation", 1 if dilation is None else dilation, rank),
            booleans("is_causal", False if is_causal is None else is_causal, rank),
            [_boundary(f"boundary[{i}]", name) for i, name in enumerate(boundaries)],
            integers("offset", offset, rank),
            strict=True,
        )
    )
    for i, window in enumerate(windows):
        _check_window(i, window)
    return windows


def _check_window(i: int, window: Window) -> None:
    """Checks all that can be said without the extent, and for a `kernel_size` of -1 not much can be."""
    kernel_size, dilation = window.kernel_size, window.dilation
    is_whole = kernel_size == -1
    if kernel_size < 1 and not is_whole:
        reject(f"kernel_size[{i}]", kernel_size, "at least 1, or -1 for the whole axis")
    if dilation < 1:
        reject(f"dilation[{i}]", dilation, "at least 1")
    if is_whole and dilation != 1:
        reject(f"dilation[{i}]", dilation, f"1 with kernel_size[{i}] = -1, the whole axis")
    if window.stride < 1:
        reject(f"stride[{i}]", window.stride, "at least 1")
    if not is_whole:
        _check_stride(i, window.stride, kernel_size)
    if not 0 <= window.offset < window.stride:
        reject(f"offset[{i}]", window.offset, f"0 to {window.stride - 1} (stride[{i}] - 1)")
    if kernel_size * dilation > _LARGEST:
        reject(f"kernel_size[{i}] * dilation[{i}]", kernel_size * dilation, f"at most {_LARGEST}")
    if not is_whole and window.boundary == VALID and (window.stride != 1 or window.is_causal):
        reject(
            f"boundary[{i}]",
            "'valid'",
            "stride 1 and is_causal False with it",
            "use another boundary",
        )


def _check_stride(i: int, stride: int, kernel_size: int) -> None:
    if stride > kernel_size:
        limit = f"1 to {kernel_size} (kernel_size[{i}])"
        reject(f"stride[{i}]", stride, limit, "tokens would go unattended between windows")


def _is_wrong(condition: Any) -> bool:
    """Whether a condition holds that must not.

    While a graph is made, sizes may be symbols, which a question would fix or bound: what cannot be known then is left to
    the core, which checks every problem again when the graph runs.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports SymPy

    return statically_known_true(condition)


def _check_fit(i: int, axis: Axis, windows: tuple[Window, ...], other: OtherLayout) -> None:
    """Checks the windows against the extent."""
    extent, kernel_size, dilation = axis.extent, axis.kernel_size, axis.dilation
    if _is_wrong(extent > _LARGEST):
        reject(f"extent[{i}]", extent, f"at most {_LARGEST}")
    _check_stride(i, axis.stride, kernel_size)
    if axis.boundary == _SHIFT and _is_wrong(kernel_size * dilation > extent):
        remedy = "use a smaller window, or another boundary than 'shift'"
        if axis.is_causal:
            remedy += (
                "; where a sequence grows step by step against a cache, boundary 'mask' in all steps: it takes axes "
                "of any extent, and without stride its causal windows are the same"
            )
        hint = other.hint(windows)
        reject(
            f"kernel_size[{i}] * dilation[{i}]",
            f"{kernel_size} * {dilation}",
            f"at most {extent}, the extent of axis {i}",
            f"{remedy}; {hint}" if hint else remedy,
        )


def _check_box(i: int, what: str, extent: int, origin: int, size: int) -> None:
    if _is_wrong(origin < 0) or _is_wrong(origin + size > extent):
        reject(
            f"{what}_origin[{i}]",
            origin,
            f"0 to {extent - size}, so that the {what}'s {size} tokens lie inside grid[{i}] = {extent}",
        )


def _origins(
    name: str, origin: IntPerAxis | None, extents: tuple[int, ...], grid: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Where a box of these extents begins. It has to be said unless the box is the grid."""
    rank = len(extents)
    if origin is not None:
        if grid is None:
            reject("grid", None, "the whole grid's extents", f"{name} is a place in the grid")
        return integers(name, origin, rank)
    if grid is not None:
        for i, (size, extent) in enumerate(zip(extents, grid, strict=True)):
            if _is_wrong(size < extent):
                reject(
                    name,
                    None,
                    f"the first of the {size} tokens on axis {i}, whose grid has {extent}",
                    "pass it, 0 included: a box may lie anywhere in its grid",
                )
    return (0,) * rank


def normalize_axes(
    query_extents: tuple[int, ...],
    key_extents: tuple[int, ...],
    grid: IntPerAxis | None,
    query_origin: IntPerAxis | None,
    key_origin: IntPerAxis | None,
    windows: tuple[Window, ...],
    other: OtherLayout,
) -> tuple[tuple[Axis, ...], tuple[int, ...]]:
    """The axes that these arguments mean, and where the query tensor begins on each.

    `query_extents` and `key_extents` are those of the tensors, or boxes.
    """
    rank = len(windows)
    whole = None if grid is None else integers("grid", grid, rank)
    extents = query_extents if whole is None else whole
    for what, sizes in (("query", query_extents), ("key", key_extents)):
        for i in range(rank):
            if _is_wrong(sizes[i] > extents[i]):
                wanted = f"at least {sizes[i]}, the {what}'s tokens on axis {i}"
                reject(f"grid[{i}]", extents[i], wanted)
    query_origins = _origins("query_origin", query_origin, query_extents, whole)
    key_origins = _origins("key_origin", key_origin, key_extents, whole)

    axes: list[Axis] = []
    for i, window in enumerate(windows):
        axis = Axis(
            extents[i],
            *window,
            query_origin=query_origins[i],
            query_extent=query_extents[i],
            key_origin=key_origins[i],
            key_extent=key_extents[i],
        )
        axis = axis._replace(is_causal=int(window.is_causal))
        if axis.kernel_size == -1:
            # On an axis without tokens nobody attends, whatever the window.
            is_empty = axis.extent == 0
            axis = axis._replace(
                kernel_size=1 if is_empty else axis.extent, boundary=_MASK if is_empty else _SHIFT
            )
        _check_fit(i, axis, windows, other)
        _check_box(i, "query", axis.extent, axis.query_origin, axis.query_extent)
        _check_box(i, "key", axis.extent, axis.key_origin, axis.key_extent)
        axes.append(_only_queries(i, axis) if axis.boundary == VALID else axis)
        # Of a graph, the core checks this when it runs: windows of symbols are unknown.
        if not torch.compiler.is_compiling() and key_extents[i] != axis.extent:
            _check_keys(i, axes[i])
    return tuple(axes), query_origins


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
    first, last = _C.attended_tokens(axis)
    if first <= last and (first < axis.key_origin or last >= axis.key_origin + axis.key_extent):
        reject(
            f"key_origin[{i}]",
            f"{axis.key_origin} with {axis.key_extent} tokens",
            f"a key box that holds tokens {first} to {last} of the grid",
            "the windows of the queries reach that far",
        )
