# SPDX-License-Identifier: MIT
"""The definition of the unfused operations in plain torch operations, as `reference` is that of fused attention.

Tensors are heads first: tokens ``[batch, heads, *grid, head_dim]``, weights ``[batch, heads, *grid, slot]``. A window
has prod(kernel_size) slots, row-major; slot t of an axis is the key ``window(query).begin + t``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from natten._autocast import without_autocast
from natten.reference import (
    _KERNEL_SIZE,
    _KEY_EXTENT,
    _axes,
    _Chunk,
    _chunks,
    _compute_type,
    _split,
)


def _queries(tensor: Tensor, heads_kv: int) -> Tensor:
    """[batch, query, heads_kv, group, head_dim or slot] of a tensor on the grid of the queries."""
    flat = tensor.to(_compute_type(tensor)).flatten(2, -2).transpose(1, 2)
    return _split(flat, 2, heads_kv)


def _keys(tensor: Tensor) -> Tensor:
    """[batch, key, heads_kv, head_dim] of a tensor on the grid of the keys."""
    return tensor.to(_compute_type(tensor)).flatten(2, -2).transpose(1, 2)


def _owned(result: Tensor) -> Tensor:
    """A contiguous copy: an op's results must be no views of others."""
    return result.clone(memory_format=torch.contiguous_format)


def _on_grid(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """The parts [batch, query, heads_kv, group, width] on the grid of `like`, and in its type."""
    shape = (*like.shape[:-1], width)
    if not parts:
        return like.new_zeros(shape)
    on_grid = torch.cat(parts, dim=1).flatten(2, 3).transpose(1, 2).reshape(shape)
    return _owned(on_grid.to(like.dtype))


def _windows(queries: Tensor, head_dim: int, flat_axes: tuple[int, ...]) -> Iterator[_Chunk]:
    batch, _, heads_kv, group, _ = queries.shape
    numbers = batch * heads_kv * max(group, head_dim)
    return _chunks(_axes(flat_axes), numbers, queries.device, whole_windows=True)


def _filled(weights: Tensor, chunk: _Chunk) -> Tensor:
    """The chunk's part of weights [batch, query, heads_kv, group, slot], with zero in slots without a key."""
    return weights[:, chunk.queries].masked_fill(~chunk.present[:, None, None], 0)


@without_autocast
def qk(
    query: Tensor, key: Tensor, rpb: Tensor | None, flat_axes: tuple[int, ...], unused: float
) -> Tensor:
    """Weights: query times key, plus bias; 0 for missing keys that count, `unused` in all other empty slots."""
    heads_kv = key.shape[1]
    queries, keys = _queries(query, heads_kv), _keys(key)
    table = None if rpb is None else _split(rpb.to(queries.dtype).flatten(1), 0, heads_kv)
    parts = []
    for chunk in _windows(queries, query.shape[-1], flat_axes):
        part = torch.einsum("bqhgd,bqwhd->bqhgw", queries[:, chunk.queries], chunk.gather(keys))
        if table is not None:
            part = part + table[:, :, chunk.bias].permute(2, 0, 1, 3)
        part = part.masked_fill(~chunk.present[:, None, None], 0)
        parts.append(part.masked_fill(~chunk.counted[:, None, None], unused))
    return _on_grid(parts, query, math.prod(axis[_KERNEL_SIZE] for axis in _axes(flat_axes)))


@without_autocast
def av(weights: Tensor, value: Tensor, flat_axes: tuple[int, ...]) -> Tensor:
    """Tokens of the queries: the sum of values by their weights. Slots without a key may hold anything."""
    columns, values = _queries(weights, value.shape[1]), _keys(value)
    parts = [
        torch.einsum("bqhgw,bqwhd->bqhgd", _filled(columns, chunk), chunk.gather(values))
        for chunk in _windows(columns, value.shape[-1], flat_axes)
    ]
    return _on_grid(parts, weights, value.shape[-1])


@without_autocast
def av_transposed(weights: Tensor, x: Tensor, flat_axes: tuple[int, ...], heads_kv: int) -> Tensor:
    """Tokens of the keys: the sum of x [batch, heads, *grid of the queries, head_dim] by the weights."""
    columns, queries = _queries(weights, heads_kv), _queries(x, heads_kv)
    key_grid = [axis[_KEY_EXTENT] for axis in _axes(flat_axes)]
    total = queries.new_zeros(x.shape[0], math.prod(key_grid), heads_kv, x.shape[-1])
    for chunk in _windows(columns, x.shape[-1], flat_axes):
        part = torch.einsum(
            "bqhgw,bqhgd->bqwhd", _filled(columns, chunk), queries[:, chunk.queries]
        )
        total = chunk.scatter(total, part)
    shape = (x.shape[0], heads_kv, *key_grid, x.shape[-1])
    return _owned(total.transpose(1, 2).reshape(shape).to(x.dtype))


@without_autocast
def rpb_gradient(weights: Tensor, flat_axes: tuple[int, ...]) -> Tensor:
    """[heads, *(2 * kernel_size - 1)]: sums of the weights of equal head and relative position."""
    heads = weights.shape[1]
    columns = _queries(weights, heads)
    entries = [2 * axis[_KERNEL_SIZE] - 1 for axis in _axes(flat_axes)]
    total = columns.new_zeros(heads, 1, math.prod(entries))
    for chunk in _windows(columns, 1, flat_axes):
        total = chunk.add_to_bias(total, _filled(columns, chunk).sum(dim=0).permute(1, 2, 0, 3))
    return _owned(total.reshape(heads, *entries))
