# SPDX-License-Identifier: MIT
"""Backend ``flex``: torch FlexAttention with our windows as its mask, for devices the core has no kernel for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten import _C
from natten._autocast import without_autocast
from natten._axes import AXIS_INTS
from natten._problem import Operands
from natten._signature import lse_dtype

_DILATION = _C.AXIS_FIELDS.index("dilation")
_QUERY_EXTENT = _C.AXIS_FIELDS.index("query_extent")
_KEY_ORIGIN = _C.AXIS_FIELDS.index("key_origin")
_KEY_EXTENT = _C.AXIS_FIELDS.index("key_extent")


def reasons(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_value: int,
    has_rpb: bool,
    needs_grad: bool,
) -> tuple[str, ...]:
    """Why FlexAttention cannot run a problem; empty: it can.

    On a CPU it runs uncompiled, with the whole matrix of logits in memory, as compiling takes it half a minute.
    """
    why: list[str] = []
    if device_type not in ("cpu", "cuda", "xpu"):
        why.append(f"FlexAttention does not run on {device_type}")
    if device_type == "cpu" and needs_grad:
        why.append("FlexAttention has no backward on cpu, and gradients are wanted")
    if device_type != "cpu":
        if dtype == torch.float64:
            why.append("FlexAttention does not compute float64 there")
        if min(head_dim, head_dim_value) < 16:
            why.append("FlexAttention wants head dims of at least 16 there")
    if has_rpb:
        why.append("the bias table is not implemented for FlexAttention")
    return tuple(why)


_T = TypeVar("_T")


def _kept(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, which makes tensors, with a cache of them: but for those of a mode or a transform, which end with it."""
    cached = lru_cache(maxsize=64)(function)

    def call(*arguments: Any) -> _T:
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return function(*arguments)
        with torch.inference_mode(False), torch.no_grad():
            return cached(*arguments)

    return call


class _AxisTable(NamedTuple):
    group: Tensor  # [query] dilation group
    begin: Tensor  # [query] window, in positions of the group
    end: Tensor  # [query]
    dilation: int
    query_extent: int
    key_origin: int
    key_extent: int


class _Tables(NamedTuple):
    axes: tuple[_AxisTable, ...]
    # [query] how many keys count as logit 0 and value 0 (boundary "zeros"), beyond 64 bits perhaps; None: nowhere one.
    missing: Tensor | None


@_kept
def _tables(flat_axes: tuple[int, ...], device: torch.device) -> _Tables:
    tables = []
    counted = torch.ones(1, dtype=torch.float64, device=device)
    missing = torch.zeros_like(counted)
    some_are_missing = False
    for first in range(0, len(flat_axes), AXIS_INTS):
        axis = flat_axes[first : first + AXIS_INTS]
        windows = _C.windows(axis)
        some_are_missing |= any(count != end - begin for _, begin, end, count in windows)
        rows = torch.tensor(windows, device=device).reshape(-1, 4)
        group, begin, end, counts = (column.contiguous() for column in rows.unbind(1))
        present = end - begin
        # A sum of products: their difference may be small beside them.
        more = counted[:, None] * (counts - present)
        missing = (missing[:, None] * present + more).flatten()
        counted = (counted[:, None] * counts).flatten()
        tables.append(
            _AxisTable(
                group,
                begin,
                end,
                dilation=axis[_DILATION],
                query_extent=axis[_QUERY_EXTENT],
                key_origin=axis[_KEY_ORIGIN],
                key_extent=axis[_KEY_EXTENT],
            )
        )
    return _Tables(tuple(tables), missing if some_are_missing else None)


def _mask_mod(tables: tuple[_AxisTable, ...]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    num_keys = math.prod(table.key_extent for table in tables)

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        additional = key >= num_keys
        attended = ~additional
        for table in reversed(tables):
            place, token = query % table.query_extent, key % table.key_extent + table.key_origin
            query, key = query // table.query_extent, key // table.key_extent
            position = token // table.dilation
            attended = (
                attended
                & (token % table.dilation == table.group[place])
                & (table.begin[place] <= position)
                & (position < table.end[place])
            )
        return attended | additional

    return mask_mod


@_kept
def _block_mask(flat_axes: tuple[int, ...], additional: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tables = _tables(flat_axes, device).axes
    # Compiled, it never holds the whole mask; on a CPU, where FlexAttention itself is not compiled, that is no matter.
    create = create_block_mask if device.type == "cpu" else torch.compile(create_block_mask)
    return create(
        _mask_mod(tables),
        None,
        None,
        math.prod(table.query_extent for table in tables),
        math.prod(table.key_extent for table in tables) + additional,
        device=device,
    )


@lru_cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device.type == "cpu" else _compiled_flex_attention()


def _flatten(tensor: Tensor, more: Tensor | None, rank: int) -> Tensor:
    """[batch, heads, token, head_dim], with additional tokens behind those of the grid."""
    tokens = tensor.flatten(1, rank)
    if more is not None:
        tokens = torch.cat([tokens, more], dim=1)
    return tokens.transpose(1, 2)


@without_autocast
def forward(operands: Operands, flat_axes: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Output [batch, *grid, heads, head_dim_value] and LSE [batch, *grid, heads] of a problem that has queries and keys."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _Transformed.apply(*operands[:-1], flat_axes, scale)  # type: ignore[no-untyped-call, no-any-return]
    return _compute(operands, flat_axes, scale)


def _compute(operands: Operands, flat_axes: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    if operands.query.device.type == "cpu":
        # Without grad mode it still refuses what would require a gradient with it.
        tensors: list[Any] = [None if t is None else t.detach() for t in operands]
        operands = Operands(*tensors)
    query, key, value, additional_keys, additional_values, _ = operands
    rank = query.dim() - 3
    grid = query.shape[:-1]
    if query.shape[0] == 0:  # vmap over nothing
        return query.new_empty(*grid, value.shape[-1]), query.new_empty(
            grid, dtype=lse_dtype(query.dtype)
        )
    additional = 0 if additional_keys is None else additional_keys.shape[1]
    with warnings.catch_warnings():
        # It warns that it is not compiled: `reasons` says so, and nobody gets here by "auto" on a CPU.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        output, aux = _flex_attention(query.device)(
            _flatten(query, None, rank),
            _flatten(key, additional_keys, rank),
            _flatten(value, additional_values, rank),
            block_mask=_block_mask(flat_axes, additional, query.device),
            scale=scale,
            enable_gqa=query.shape[-2] != key.shape[-2],
            return_aux=AuxRequest(lse=True),
        )
    output, lse = output.transpose(1, 2), aux.lse.transpose(1, 2)
    missing = _tables(flat_axes, query.device).missing
    if missing is not None:
        total = torch.logaddexp(lse, missing.to(lse.dtype).log()[:, None])
        output = (output * (lse - total).exp()[..., None]).to(output.dtype)
        lse = total
    return output.reshape(*grid, value.shape[-1]), lse.reshape(grid)


class _Transformed(torch.autograd.Function):
    """The same under transforms of torch.func and in forward mode, which FlexAttention does not know.

    vmap's dim is folded into the batch; derivatives are refused.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, flat_axes, scale = arguments
        return _compute(Operands(*operands), flat_axes, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        message = "backend 'flex' has no gradients under torch.func: use torch.autograd, or another backend"
        raise NotImplementedError(message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        message = "backend 'flex' has no forward mode: use another backend"
        raise NotImplementedError(message)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        *operands, flat_axes, scale = arguments
        size = info.batch_size

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        folded = (fold(*pair) for pair in zip(operands, in_dims, strict=False))
        results = _Transformed.apply(*folded, flat_axes, scale)  # type: ignore[no-untyped-call]
        query, dim = operands[0], in_dims[0]
        batch = query.shape[0] if dim is None or dim > 0 else query.shape[1]
        return tuple([result.unflatten(0, (size, batch)) for result in results]), (0, 0)
