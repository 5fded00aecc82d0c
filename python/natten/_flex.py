# SPDX-License-Identifier: MIT
"""Backend ``flex``: torch FlexAttention with our windows as its mask, for devices the core has no kernel for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten import _C
from natten._autocast import without_autocast
from natten._axes import AXIS_INTS
from natten._problem import Operands

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


class _AxisTable(NamedTuple):
    group: Tensor  # [query] dilation group
    begin: Tensor  # [query] window, in positions of the group
    end: Tensor  # [query]
    counted: Tensor  # [query] keys that the softmax counts, missing ones of boundary "zeros" too
    dilation: int
    query_extent: int
    key_origin: int
    key_extent: int


@lru_cache(maxsize=64)
def _tables(flat_axes: tuple[int, ...], device: torch.device) -> tuple[_AxisTable, ...]:
    tables = []
    for first in range(0, len(flat_axes), AXIS_INTS):
        axis = flat_axes[first : first + AXIS_INTS]
        rows = torch.tensor(_C.windows(axis), device=device).reshape(-1, 4)
        group, begin, end, counted = (column.contiguous() for column in rows.unbind(1))
        tables.append(
            _AxisTable(
                group,
                begin,
                end,
                counted,
                dilation=axis[_DILATION],
                query_extent=axis[_QUERY_EXTENT],
                key_origin=axis[_KEY_ORIGIN],
                key_extent=axis[_KEY_EXTENT],
            )
        )
    return tuple(tables)


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


@lru_cache(maxsize=64)
def _block_mask(flat_axes: tuple[int, ...], additional: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tables = _tables(flat_axes, device)
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


def _missing(tables: tuple[_AxisTable, ...]) -> Tensor:
    """[query] how many keys count as logit 0 and value 0 (boundary "zeros")."""
    counted = present = torch.ones(1, dtype=torch.int64, device=tables[0].begin.device)
    for table in tables:
        counted = (counted[:, None] * table.counted).flatten()
        present = (present[:, None] * (table.end - table.begin)).flatten()
    return counted - present


@without_autocast
def forward(operands: Operands, flat_axes: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Output [batch, *grid, heads, head_dim_value] and LSE [batch, *grid, heads] of a problem."""
    from torch.nn.attention.flex_attention import AuxRequest

    if operands.query.device.type == "cpu":
        # Without grad mode it still refuses what would require a gradient with it.
        tensors: list[Any] = [None if t is None else t.detach() for t in operands]
        operands = Operands(*tensors)
    query, key, value, additional_keys, additional_values, _ = operands
    rank = query.dim() - 3
    grid = query.shape[:-1]
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
    missing = _missing(_tables(flat_axes, query.device))
    if bool(missing.any()):
        total = torch.logaddexp(lse, missing.to(lse.dtype).log()[:, None])
        output = (output * (lse - total).exp()[..., None]).to(output.dtype)
        lse = total
    return output.reshape(*grid, value.shape[-1]), lse.reshape(grid)
