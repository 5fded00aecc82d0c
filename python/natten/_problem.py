# SPDX-License-Identifier: MIT
"""The problem: what a call means, as plain numbers. What its tensors must be is checked here, its axes in `_axes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from natten import _C
from natten._axes import (
    VALID,
    Axis,
    BoolPerAxis,
    BoundaryPerAxis,
    IntPerAxis,
    OtherLayout,
    boolean,
    normalize_axes,
    normalize_windows,
    number,
)
from natten._errors import reject

DTYPES = tuple(getattr(torch, name) for name in _C.DTYPES)


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
    optional = operands._field_defaults
    return tuple(
        None if tensor is None and name in optional else _describe(name, tensor)
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


def _describe(name: str, tensor: Any) -> TensorInfo:
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
    if torch.onnx.is_in_onnx_export():
        message = "torch.onnx.export(..., dynamo=False) knows no neighborhood attention: give dynamo=True, its default"
        raise NotImplementedError(message)
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
        scale=head_dim**-0.5 if scale is None else number("scale", scale),
    )


def _check_rpb(
    rpb: TensorInfo, axes: tuple[Axis, ...], heads: int, query: TensorInfo, hint: str = ""
) -> None:
    shape = (heads, *(2 * axis.kernel_size - 1 for axis in axes))
    if tuple(rpb.shape) != shape:
        wanted = f"{shape}, which is [heads, *(2 * kernel_size - 1)]"
        is_of_dim_1 = len(rpb.shape) > 0 and rpb.shape[0] == query.shape[1]
        reject("rpb.shape", tuple(rpb.shape), wanted, hint if is_of_dim_1 else "")
    if not rpb.dtype.is_floating_point:
        reject("rpb.dtype", rpb.dtype, "a floating point type", "convert it")
    if rpb.device != query.device:
        reject("rpb.device", rpb.device, f"{query.device}, as the query", "move one")


_IF_HEADS_FIRST = "if the tensors are heads first, [batch, heads, *grid, head_dim], pass tensor.movedim(1, -2) of each"
_IF_HEADS_LAST = "if the tensors are heads last, [batch, *grid, heads, head_dim], pass tensor.movedim(-2, 1) of each"


def normalize(
    infos: OperandInfos,
    rank: int | None,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    boundary: BoundaryPerAxis,
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
        reject(
            "value.shape[1:-2]", tuple(value.shape[1:-2]), f"{tuple(key_extents)}, the key's grid"
        )
    windows = normalize_windows(rank, kernel_size, stride, dilation, is_causal, boundary, offset)
    other = OtherLayout(query.shape[2:-1], _IF_HEADS_FIRST)
    if grid is None and query_extents != key_extents:
        remedy = "if they are boxes of a larger grid, pass grid, query_origin and key_origin"
        hint = other.hint(windows) if query_extents[1:] == key_extents[1:] else ""
        reject(
            "key.shape[1:-2]",
            tuple(key_extents),
            f"{tuple(query_extents)}, the query's grid",
            f"{remedy}; {hint}" if hint else remedy,
        )
    axes, query_origins = normalize_axes(
        query_extents, key_extents, grid, query_origin, key_origin, windows, other
    )
    if rpb is not None:
        _check_rpb(rpb, axes, common.heads, query, other.remedy)
    return _problem("forward", query, common, axes, query_origins, has_rpb=rpb is not None)


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
        is_causal=int(boolean("is_causal", is_causal)),
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
    windows = normalize_windows(rank, *arguments)
    other = OtherLayout(second.shape[1:-2], _IF_HEADS_LAST)
    axes, _ = normalize_axes(extents, extents, None, None, None, windows, other)
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
            if axis.boundary == VALID
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
