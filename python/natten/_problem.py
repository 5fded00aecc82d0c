# SPDX-License-Identifier: MIT
"""The problem: what a call means, as plain numbers. All normalisation and every ``ArgumentError`` live here.

No window is computed here: whatever depends on one asks the compiled core.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from natten import _C

IntPerAxis: TypeAlias = "int | Sequence[int]"
BoolPerAxis: TypeAlias = "bool | Sequence[bool]"
StrPerAxis: TypeAlias = "str | Sequence[str]"

AXIS_INTS = len(_C.AXIS_FIELDS)
DTYPES = tuple(getattr(torch, name) for name in _C.DTYPES)
_BOUNDARY_IDS = {name: index for index, name in enumerate(_C.BOUNDARIES)}
_SHIFT = _BOUNDARY_IDS["shift"]
_VALID = _BOUNDARY_IDS["valid"]
# The core counts positions in 32 bits, and a window may reach beyond both ends of its grid.
_LARGEST = 2**29


class ArgumentError(ValueError, RuntimeError):
    """An argument that means nothing.

    A ``ValueError``; also a ``RuntimeError``, which is what the oldest callers catch.
    """


def reject(argument: str, value: object, wanted: str, remedy: str = "") -> NoReturn:
    """Raises the error for `argument`: what it was, what is wanted, and what to do about it."""
    advice = f": {remedy}" if remedy else ""
    message = f"{argument} = {value}; wanted {wanted}{advice}"
    raise ArgumentError(message)


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


class TensorInfo(NamedTuple):
    """What a problem depends on of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Operands(NamedTuple):
    """The tensors of a problem."""

    query: Tensor  # [batch, *grid, heads, head_dim]
    key: Tensor  # [batch, *grid, heads_kv, head_dim]
    value: Tensor  # [batch, *grid, heads_kv, head_dim_value]
    additional_keys: Tensor | None = None  # [batch, token, heads_kv, head_dim]
    additional_values: Tensor | None = None  # [batch, token, heads_kv, head_dim_value]
    rpb: Tensor | None = None  # [heads, *(2 * kernel_size - 1)]

    def describe(self) -> OperandInfos:
        """What the problem depends on of them."""
        return (
            _describe("query", self.query),
            _describe("key", self.key),
            _describe("value", self.value),
            None
            if self.additional_keys is None
            else _describe("additional_keys", self.additional_keys),
            None
            if self.additional_values is None
            else _describe("additional_values", self.additional_values),
            None if self.rpb is None else _describe("rpb", self.rpb),
        )


OperandInfos: TypeAlias = tuple[
    TensorInfo, TensorInfo, TensorInfo, TensorInfo | None, TensorInfo | None, TensorInfo | None
]


class QkOperands(NamedTuple):
    """The tensors of attention weights, heads first."""

    query: Tensor  # [batch, heads, *grid, head_dim]
    key: Tensor  # [batch, heads_kv, *grid, head_dim]
    additional_keys: Tensor | None = None  # [batch, heads_kv, token, head_dim]
    rpb: Tensor | None = None  # [heads, *(2 * kernel_size - 1)]


class AvOperands(NamedTuple):
    """The tensors of a weighted sum, heads first."""

    attn: Tensor  # [batch, heads, *grid, slot + token]
    value: Tensor  # [batch, heads_kv, *grid, head_dim]
    additional_values: Tensor | None = None  # [batch, heads_kv, token, head_dim]


def describe(operands: QkOperands | AvOperands) -> tuple[TensorInfo | None, ...]:
    """What the problem depends on of them."""
    return tuple(
        None if tensor is None else _describe(name, tensor)
        for name, tensor in zip(operands._fields, operands, strict=True)
    )


@dataclass(frozen=True)
class Problem:
    """An attention problem.

    Attributes:
        op: What computes it: "forward" is fused attention, "qk" and "av" are its unfused halves.
        axes: The grid, outermost axis first. The query box is that of the tokens which really are queries.
        narrowing: Dim, start and length of the query tensor's part that holds queries; for boundary "valid" only.
        additional_keys: Dense keys that every query attends to.
        flat_axes: The numbers of `axes` in one row.
    """

    op: str
    dtype: torch.dtype
    device: torch.device
    axes: tuple[Axis, ...]
    narrowing: tuple[tuple[int, int, int], ...]
    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_value: int
    additional_keys: int
    has_rpb: bool
    scale: float
    flat_axes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Of the grid."""
        return len(self.axes)


def _describe(name: str, tensor: Tensor) -> TensorInfo:
    # Sparse and nested tensors are turned away here: they have no strides to look at.
    if not isinstance(tensor, Tensor):
        reject(name, type(tensor).__name__, "a torch.Tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        message = f"{name} is a nested or sparse tensor; only dense tensors are implemented"
        raise NotImplementedError(message)
    return TensorInfo(_shape(tensor), tensor.dtype, tensor.device)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    tracing = torch._C._get_tracing_state()
    if tracing is None:
        return tensor.shape
    # torch.jit.trace records sizes as tensors, which a problem, a constant of the trace, cannot be made of.
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return tuple(tensor.shape)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Common:
    """What neighborhood and dense attention check and derive alike."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_value: int
    additional_keys: int
    scale: float


def _check_dtype(name: str, tensor: TensorInfo) -> None:
    if tensor.dtype not in DTYPES:
        wanted = f"one of {', '.join(map(str, DTYPES))}"
        reject(f"{name}.dtype", tensor.dtype, wanted, "convert it")


def _check_alike(name: str, other: TensorInfo, like: str, tensor: TensorInfo, rank: int) -> None:
    """Checks that `other` has the type, device and batch size of `tensor`, and `rank` dims."""
    if other.dtype != tensor.dtype:
        reject(f"{name}.dtype", other.dtype, f"{tensor.dtype}, as the {like}", "convert one")
    if other.device != tensor.device:
        reject(f"{name}.device", other.device, f"{tensor.device}, as the {like}", "move one")
    if len(other.shape) != rank:
        reject(f"{name}.ndim", len(other.shape), f"{rank}", "unsqueeze or reshape it")
    if other.shape[0] != tensor.shape[0]:
        reject(f"{name}.shape[0]", other.shape[0], f"{tensor.shape[0]}, the {like}'s batch size")


def _check_heads(name: str, heads: int, kv_name: str, heads_kv: int, like: str) -> None:
    if heads == 0:
        reject(name, heads, "at least 1 head")
    if heads_kv == 0 or heads % heads_kv != 0:
        reject(kv_name, heads_kv, f"a divisor of {heads}, the {like}'s number of heads")


def _check_tensors(
    query: TensorInfo,
    key: TensorInfo,
    value: TensorInfo,
    additional_keys: TensorInfo | None,
    additional_values: TensorInfo | None,
    scale: float | None,
) -> _Common:
    _check_dtype("query", query)
    others = [("key", key), ("value", value)]
    if (additional_keys is None) != (additional_values is None):
        absent = "additional_keys" if additional_keys is None else "additional_values"
        reject(absent, None, "a tensor", "pass additional_keys and additional_values together")
    if additional_keys is not None and additional_values is not None:
        others += [("additional_keys", additional_keys), ("additional_values", additional_values)]
    for name, other in others:
        rank = len(query.shape) if name in ("key", "value") else 4
        _check_alike(name, other, "query", query, rank)
    heads, heads_kv = query.shape[-2], key.shape[-2]
    _check_heads("query.shape[-2]", heads, "key.shape[-2]", heads_kv, "query")
    if value.shape[-2] != heads_kv:
        reject("value.shape[-2]", value.shape[-2], f"{heads_kv}, the key's number of heads")
    if query.shape[-1] == 0:
        reject("query.shape[-1]", 0, "a head dim of at least 1")
    if value.shape[-1] == 0:
        reject("value.shape[-1]", 0, "a head dim of at least 1")
    if key.shape[-1] != query.shape[-1]:
        reject("key.shape[-1]", key.shape[-1], f"{query.shape[-1]}, the query's head dim")
    count = 0
    if additional_keys is not None and additional_values is not None:
        count = additional_keys.shape[1]
        if additional_values.shape[1] != count:
            reject(
                "additional_values.shape[1]",
                additional_values.shape[1],
                f"{count}, the number of additional_keys",
            )
        for name, extra, like, other in (
            ("additional_keys", additional_keys, "key", key),
            ("additional_values", additional_values, "value", value),
        ):
            for dim, what in ((-2, "number of heads"), (-1, "head dim")):
                if extra.shape[dim] != other.shape[dim]:
                    reject(
                        f"{name}.shape[{dim}]",
                        extra.shape[dim],
                        f"{other.shape[dim]}, the {like}'s {what}",
                    )
    head_dim = query.shape[-1]
    return _Common(
        batch=query.shape[0],
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_value=value.shape[-1],
        additional_keys=count,
        scale=head_dim**-0.5 if scale is None else _number("scale", scale),
    )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # a SymInt is an int to everybody but the type checker
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    reject(name, repr(value), "an integer")


def _number(name: str, value: Any) -> float:
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(
        value, bool
    ):
        return float(value)
    if not isinstance(value, bool) and hasattr(value, "__float__"):
        return float(value)
    reject(name, repr(value), "a number")


def _boolean(name: str, value: Any) -> bool:
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


def _integers(name: str, value: Any, rank: int) -> tuple[int, ...]:
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
        sides = (0,) * rank if shape is None else _integers(name, shape, rank)
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
    if axis.boundary == _VALID and (axis.stride != 1 or axis.is_causal):
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


def _axes(
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
    boundary: StrPerAxis,
    offset: IntPerAxis,
) -> tuple[Axis, ...]:
    extents = query_extents if grid is None else _integers("grid", grid, rank)
    kernel_sizes = _integers("kernel_size", kernel_size, rank)
    strides = _integers("stride", 1 if stride is None else stride, rank)
    dilations = _integers("dilation", 1 if dilation is None else dilation, rank)
    offsets = _integers("offset", offset, rank)
    causal = per_axis("is_causal", False if is_causal is None else is_causal, rank)
    boundaries = per_axis("boundary", boundary, rank)

    axes: list[Axis] = []
    for i in range(rank):
        axis = Axis(
            extent=extents[i],
            kernel_size=kernel_sizes[i],
            stride=strides[i],
            dilation=dilations[i],
            is_causal=int(_boolean(f"is_causal[{i}]", causal[i])),
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
        axes.append(_only_queries(i, axis) if axis.boundary == _VALID else axis)
        if key_extents[i] != axis.extent:
            _check_keys(i, axes[i])
    return tuple(axes)


def _check_rpb(rpb: TensorInfo, axes: tuple[Axis, ...], heads: int, query: TensorInfo) -> None:
    shape = (heads, *(2 * axis.kernel_size - 1 for axis in axes))
    if tuple(rpb.shape) != shape:
        wanted = f"{shape}, which is [heads, *(2 * kernel_size - 1)]"
        reject("rpb.shape", tuple(rpb.shape), wanted)
    if not rpb.dtype.is_floating_point:
        reject("rpb.dtype", rpb.dtype, "a floating point type", "convert it")
    if rpb.device != query.device:
        reject("rpb.device", rpb.device, f"{query.device}, as the query", "move one")


def normalize(
    infos: OperandInfos,
    rank: int | None,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    boundary: StrPerAxis,
    offset: IntPerAxis,
    grid: IntPerAxis | None,
    query_origin: IntPerAxis | None,
    key_origin: IntPerAxis | None,
    scale: float | None,
) -> Problem:
    """The problem that the arguments of a neighborhood attention call mean.

    `rank` is what the grid's must be; None: whatever the query's is. Raises an `ArgumentError` if an argument is
    wrong, or does not fit another one.
    """
    query, key, value, additional_keys, additional_values, rpb = infos
    if rank is None:
        rank = len(query.shape) - 3
        if not 1 <= rank <= 3:
            reject("query.ndim", len(query.shape), "4, 5 or 6: [batch, *grid, heads, head_dim]")
    elif len(query.shape) != rank + 3:
        reject(
            "query.ndim", len(query.shape), f"{rank + 3}: [batch, {'x, ' * rank}heads, head_dim]"
        )
    common = _check_tensors(query, key, value, additional_keys, additional_values, scale)
    query_extents, key_extents = query.shape[1:-2], key.shape[1:-2]
    if value.shape[1:-2] != key_extents:
        reject("value.shape[1:-2]", value.shape[1:-2], f"{key_extents}, the key's grid")
    if grid is None:
        if query_origin is not None or key_origin is not None:
            reject("grid", None, "the whole grid's extents", "an origin is a place in the grid")
        if query_extents != key_extents:
            reject(
                "key.shape[1:-2]",
                tuple(key_extents),
                f"{tuple(query_extents)}, the query's grid",
                "if they are boxes of a larger grid, pass grid, query_origin and key_origin",
            )
    query_origins = _integers("query_origin", 0 if query_origin is None else query_origin, rank)
    axes = _axes(
        rank,
        query_extents,
        key_extents,
        grid,
        query_origins,
        _integers("key_origin", 0 if key_origin is None else key_origin, rank),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )
    if rpb is not None:
        _check_rpb(rpb, axes, common.heads, query)
    return _problem("forward", query, common, axes, query_origins, has_rpb=rpb is not None)


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


def normalize_dense(infos: OperandInfos, is_causal: bool, scale: float | None) -> Problem:
    """The problem that the arguments of a dense attention call mean: one axis, and a window as wide as it.

    The axis is as long as the longer of both sequences; where that is the query's, the kernels clip the windows to
    the keys that exist.
    """
    query, key, value, *_ = infos
    if len(query.shape) != 4:
        reject("query.ndim", len(query.shape), "4: [batch, sequence, heads, head_dim]")
    common = _check_tensors(query, key, value, None, None, scale)
    length, key_length = query.shape[1], key.shape[1]
    if value.shape[1] != key_length:
        reject("value.shape[1]", value.shape[1], f"{key_length}, the key's length")
    extent = max(length, key_length, 1)
    axis = Axis(
        extent=extent,
        kernel_size=extent,
        is_causal=int(_boolean("is_causal", is_causal)),
        query_extent=length,
        key_extent=key_length,
    )
    return _problem("forward", query, common, (axis,), (0,), has_rpb=False)


def normalize_qk(
    infos: tuple[TensorInfo, TensorInfo, TensorInfo | None, TensorInfo | None],
    rank: int,
    *arguments: Any,
) -> Problem:
    """The problem of attention weights. `arguments`: kernel_size to offset, as of `normalize`."""
    query, key, additional_keys, rpb = infos
    common, axes = _check_unfused(
        ("query", query), ("key", key), ("additional_keys", additional_keys), rank, arguments
    )
    if key.shape[-1] != query.shape[-1]:
        reject("key.shape[-1]", key.shape[-1], f"{query.shape[-1]}, the query's head dim")
    extents = tuple(query.shape[2:-1])
    if extents != tuple(key.shape[2:-1]):
        reject("key.shape[2:-1]", tuple(key.shape[2:-1]), f"{extents}, the query's grid")
    if rpb is not None:
        _check_rpb(rpb, axes, common.heads, query)
    return _problem("qk", query, common, axes, (0,) * rank, has_rpb=rpb is not None)


def normalize_av(
    infos: tuple[TensorInfo, TensorInfo, TensorInfo | None], rank: int, *arguments: Any
) -> Problem:
    """The problem of a sum weighted by attention weights. `arguments`: kernel_size to offset, as of `normalize`."""
    attn, value, additional_values = infos
    common, axes = _check_unfused(
        ("attn", attn), ("value", value), ("additional_values", additional_values), rank, arguments
    )
    grid = tuple(axis.query_extent for axis in axes)
    if tuple(attn.shape[2:-1]) != grid:
        reject("attn.shape[2:-1]", tuple(attn.shape[2:-1]), f"{grid}, the grid of the queries")
    slots = math.prod(
        [axis.kernel_size for axis in axes]
    )  # no generator: torch.compile does not take it
    if attn.shape[-1] != slots + common.additional_keys:
        extra = f" + {common.additional_keys} additional" if common.additional_keys else ""
        wanted = f"{slots + common.additional_keys}, which is prod(kernel_size){extra}"
        reject("attn.shape[-1]", attn.shape[-1], wanted)
    # The weights are those of the queries already: there is nothing to narrow.
    origins = tuple(axis.query_origin for axis in axes)
    return _problem("av", attn, common, axes, origins, has_rpb=False)


def _check_unfused(
    rows: tuple[str, TensorInfo],
    columns: tuple[str, TensorInfo],
    extra: tuple[str, TensorInfo | None],
    rank: int,
    arguments: tuple[Any, ...],
) -> tuple[_Common, tuple[Axis, ...]]:
    """What is common to heads-first tensors: of the queries, of the keys, and of additional keys."""
    (name, first), (kv_name, second), (extra_name, third) = rows, columns, extra
    layout = f"[batch, heads, {'x, ' * rank}"
    if len(first.shape) != rank + 3:
        last = "head_dim]" if name == "query" else "prod(kernel_size)]"
        reject(f"{name}.ndim", len(first.shape), f"{rank + 3}: {layout}{last}")
    _check_dtype(name, first)
    _check_alike(kv_name, second, name, first, rank + 3)
    heads, heads_kv = first.shape[1], second.shape[1]
    _check_heads(f"{name}.shape[1]", heads, f"{kv_name}.shape[1]", heads_kv, name)
    head_dim = second.shape[-1]
    if head_dim == 0:
        reject(f"{kv_name}.shape[-1]", 0, "a head dim of at least 1")
    count = 0
    if third is not None:
        _check_alike(extra_name, third, name, first, 4)
        count = third.shape[2]
        for dim, wanted, what in ((1, heads_kv, "number of heads"), (-1, head_dim, "head dim")):
            if third.shape[dim] != wanted:
                reject(
                    f"{extra_name}.shape[{dim}]",
                    third.shape[dim],
                    f"{wanted}, the {kv_name}'s {what}",
                )
    extents = tuple(second.shape[2:-1])
    origins = (0,) * rank
    axes = _axes(rank, extents, extents, None, origins, origins, *arguments)
    return _Common(first.shape[0], heads, heads_kv, head_dim, head_dim, count, 1.0), axes


def _problem(
    op: str,
    query: TensorInfo,
    common: _Common,
    axes: tuple[Axis, ...],
    query_origins: tuple[int, ...],
    *,
    has_rpb: bool,
) -> Problem:
    return Problem(
        op=op,
        dtype=query.dtype,
        device=query.device,
        axes=axes,
        narrowing=tuple(
            (dim, axis.query_origin - origin, axis.query_extent)
            for dim, (axis, origin) in enumerate(
                zip(axes, query_origins, strict=True), start=1 if op == "forward" else 2
            )
            if axis.boundary == _VALID
        ),
        batch=common.batch,
        heads=common.heads,
        heads_kv=common.heads_kv,
        head_dim=common.head_dim,
        head_dim_value=common.head_dim_value,
        additional_keys=common.additional_keys,
        has_rpb=has_rpb,
        scale=common.scale,
        flat_axes=tuple(number for axis in axes for number in axis),
    )
