# SPDX-License-Identifier: MIT
"""The definition of neighborhood attention in plain torch operations: the oracle of all tests.

Any device, any floating point type, differentiable to any order. Queries are taken in chunks, so that memory is that
of a chunk's windows and not of the whole attention matrix. Which keys a query attends to is asked of the compiled
core, the only place that knows windows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from natten import _C
from natten._autocast import without_autocast
from natten._axes import AXIS_INTS
from natten._problem import Operands

_KERNEL_SIZE = _C.AXIS_FIELDS.index("kernel_size")
_DILATION = _C.AXIS_FIELDS.index("dilation")
_QUERY_ORIGIN = _C.AXIS_FIELDS.index("query_origin")
_QUERY_EXTENT = _C.AXIS_FIELDS.index("query_extent")
_KEY_ORIGIN = _C.AXIS_FIELDS.index("key_origin")
_KEY_EXTENT = _C.AXIS_FIELDS.index("key_extent")
# Gathered numbers per chunk: 64 MiB in float32.
_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True)
class _AxisTable:
    """What the queries of one axis attend to, in slots."""

    keys: Tensor  # [query, slot] token of the key tensor, 0 where the slot is empty
    present: Tensor  # [query, slot] whether the slot holds a key
    bias: Tensor  # [query, slot] index into the bias table, 0 where the slot is empty
    counted: Tensor  # [query] keys that the softmax counts, missing ones of boundary "zeros" too


@functools.lru_cache(maxsize=64)
def _windows(axis: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Numbers, and no tensors: what is made under a transform, or of fakes, must not outlive them."""
    return tuple(_C.windows(axis))


def _axis_table(axis: tuple[int, ...], slots: int | None) -> _AxisTable:
    """`slots`: None for as many as the widest window has keys."""
    windows = _windows(axis)
    width = slots
    if width is None:
        width = max((end - begin for _, begin, end, _ in windows), default=0)
    # On the CPU: a table is a few numbers per query of one axis.
    rows = torch.tensor(windows, dtype=torch.int64, device="cpu").reshape(-1, 4)
    group, begin, end, counted = rows.unbind(1)
    dilation = axis[_DILATION]
    tokens = axis[_QUERY_ORIGIN] + torch.arange(len(windows), device="cpu")
    keys = begin[:, None] + torch.arange(width, device="cpu")
    present = keys < end[:, None]
    bias = keys - (tokens // dilation)[:, None] + axis[_KERNEL_SIZE] - 1
    keys = keys * dilation + group[:, None] - axis[_KEY_ORIGIN]
    return _AxisTable(
        keys=keys.where(present, 0),
        present=present,
        bias=bias.where(present, 0),
        counted=counted,
    )


@dataclass(frozen=True)
class _Chunk:
    """A run of queries, row-major over the grid, and the keys they attend to, row-major over the window."""

    queries: slice
    keys: Tensor  # [query, slot]
    present: Tensor  # [query, slot]
    bias: Tensor  # [query, slot] index into the flattened bias table
    missing: Tensor  # [query] keys that count as logit 0 and value 0, float64 on the CPU: they may be beyond 64 bits
    counted: Tensor  # [query, slot] whether the slot holds a key, or a missing one that counts

    def gather(self, tensor: Tensor) -> Tensor:
        """[batch, query, slot, heads_kv, head_dim] of [batch, key, heads_kv, head_dim].

        Zero in empty slots, so that nothing leaks out of them.
        """
        gathered = tensor[:, self.keys]
        return gathered.masked_fill(~self.present[..., None, None], 0)

    def scatter(self, target: Tensor, gathered: Tensor) -> Tensor:
        """`target` plus what `gather` would have gathered from it; empty slots are passed over."""
        kept = gathered.masked_fill(~self.present[..., None, None], 0)
        return target.index_add(1, self.keys.flatten(), kept.flatten(1, 2))

    def add_to_bias(self, target: Tensor, weights: Tensor) -> Tensor:
        """`target` [heads_kv, group, entry] plus [heads_kv, group, query, slot], which are zero in empty slots."""
        return target.index_add(2, self.bias.flatten(), weights.flatten(2))


def _chunks(
    axes: list[tuple[int, ...]],
    numbers_per_slot: int,
    device: torch.device,
    whole_windows: bool = False,
) -> Iterator[_Chunk]:
    """`whole_windows`: with kernel_size slots an axis, however short its windows are."""
    tables = [_axis_table(axis, axis[_KERNEL_SIZE] if whole_windows else None) for axis in axes]
    extents = [axis[_QUERY_EXTENT] for axis in axes]
    count = math.prod(extents)
    slots = math.prod(table.keys.shape[1] for table in tables)
    size = count  # in a graph for any batch, whose size is symbolic
    if isinstance(numbers_per_slot, int):
        size = max(1, _CHUNK_NUMBERS // max(1, slots * numbers_per_slot))
    for begin in range(0, count, max(1, size)):
        flat = torch.arange(begin, min(begin + size, count), device="cpu")
        rest, places = flat, []
        for extent in reversed(extents):
            places.append(rest % extent)
            rest = rest // extent
        places.reverse()
        keys = bias = flat.new_zeros(len(flat), 1)
        present = in_counted = torch.ones(len(flat), 1, dtype=torch.bool, device="cpu")
        missing = torch.zeros(len(flat), dtype=torch.float64, device="cpu")
        all_counted = torch.ones_like(missing)
        for axis, table, place in zip(axes, tables, places, strict=True):
            keys = (keys[:, :, None] * axis[_KEY_EXTENT] + table.keys[place][:, None]).flatten(1)
            width = 2 * axis[_KERNEL_SIZE] - 1
            bias = (bias[:, :, None] * width + table.bias[place][:, None]).flatten(1)
            present = (present[:, :, None] & table.present[place][:, None]).flatten(1)
            counts, had = table.counted[place], table.present[place].sum(1)
            # A sum of products: their difference may be small beside them.
            missing = missing * had + all_counted * (counts - had)
            all_counted = all_counted * counts
            along = torch.arange(table.keys.shape[1], device="cpu") < counts[:, None]
            in_counted = (in_counted[:, :, None] & along[:, None]).flatten(1)
        yield _Chunk(
            queries=slice(begin, begin + len(flat)),
            keys=keys.where(present, 0).to(device),
            present=present.to(device),
            bias=bias.where(present, 0).to(device),
            missing=missing,
            counted=in_counted.to(device),
        )


@dataclass(frozen=True)
class _Computed:
    """The tensors of a problem in the type that is computed in, with the grid as one dim."""

    query: Tensor  # [batch, query, heads_kv, group, head_dim]
    key: Tensor  # [batch, key, heads_kv, head_dim]
    value: Tensor  # [batch, key, heads_kv, head_dim_value]
    additional_keys: Tensor | None  # [batch, token, heads_kv, head_dim]
    additional_values: Tensor | None  # [batch, token, heads_kv, head_dim_value]
    rpb: Tensor | None  # [heads_kv, group, entry]
    axes: list[tuple[int, ...]]
    scale: float

    def chunks(self) -> Iterator[_Chunk]:
        batch, _, heads_kv, group, head_dim = self.query.shape
        numbers = batch * heads_kv * max(head_dim, self.value.shape[-1], group)
        return _chunks(self.axes, numbers, self.query.device)

    def weights(self, chunk: _Chunk, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of the chunk [batch, query, heads_kv, group, slot + token], and its LSE [..., group]."""
        query = self.query[:, chunk.queries]
        logits = torch.einsum("bqhgd,bqwhd->bqhgw", query, keys) * self.scale
        if self.rpb is not None:
            logits = logits + self.rpb[:, :, chunk.bias].permute(2, 0, 1, 3)
        logits = logits.masked_fill(~chunk.present[:, None, None], -math.inf)
        if self.additional_keys is not None:
            dense = torch.einsum("bqhgd,bnhd->bqhgn", query, self.additional_keys) * self.scale
            logits = torch.cat([logits, dense], dim=-1)
        missing = chunk.missing.to(logits)[:, None, None]
        # Softmax does not change with what is subtracted: no gradient needs to flow through it.
        if logits.shape[-1] == 0:
            shift = logits.new_zeros(logits.shape[:-1])
        else:
            shift = logits.detach().amax(dim=-1)
            shift = torch.where(missing > 0, shift.clamp(min=0), shift)
            shift = shift.masked_fill(shift == -math.inf, 0)
        exponentials = (logits - shift[..., None]).exp()
        # Where none is missing, 0: not 0 times the overflow that very negative logits would be here.
        zeros = missing * (-shift).masked_fill(missing == 0, -math.inf).exp()
        total = exponentials.sum(dim=-1) + zeros
        # No key at all: weights 0 and LSE -inf, and no NaN on the way back.
        alone = total == 0
        total = total.masked_fill(alone, 1)
        lse = (shift + total.log()).masked_fill(alone, -math.inf)
        return exponentials / total[..., None], lse


def _split(tensor: Tensor, heads_dim: int, heads_kv: int) -> Tensor:
    """`tensor` with its heads as heads_kv times the group that shares a key head."""
    group = tensor.shape[heads_dim] // heads_kv
    split: Tensor = tensor.unflatten(heads_dim, (heads_kv, group))  # type: ignore[no-untyped-call]
    return split


def _axes(flat_axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [flat_axes[i : i + AXIS_INTS] for i in range(0, len(flat_axes), AXIS_INTS)]


def _compute_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _computed(operands: Operands, flat_axes: tuple[int, ...], scale: float) -> _Computed:
    query, key, value, additional_keys, additional_values, rpb = operands
    compute = _compute_type(query)
    rank = len(flat_axes) // AXIS_INTS
    heads_kv = key.shape[-2]

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(compute)

    return _Computed(
        query=_split(query.to(compute).flatten(1, rank), -2, heads_kv),
        key=key.to(compute).flatten(1, rank),
        value=value.to(compute).flatten(1, rank),
        additional_keys=cast(additional_keys),
        additional_values=cast(additional_values),
        rpb=None if rpb is None else _split(rpb.to(compute).flatten(1), 0, heads_kv),
        axes=_axes(flat_axes),
        scale=scale,
    )


@without_autocast
def forward(operands: Operands, flat_axes: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Output [batch, *grid, heads, head_dim_value] and LSE [batch, *grid, heads] of a problem.

    `flat_axes` are the 11 integers of each axis, as in `natten._problem.Axis`.
    """
    query, _, value, *_ = operands
    o = _computed(operands, flat_axes, scale)
    outputs, lses = [], []
    for chunk in o.chunks():
        weights, lse = o.weights(chunk, chunk.gather(o.key))
        slots = chunk.keys.shape[1]
        output = torch.einsum("bqhgw,bqwhd->bqhgd", weights[..., :slots], chunk.gather(o.value))
        if o.additional_values is not None:
            output = output + torch.einsum(
                "bqhgn,bnhd->bqhgd", weights[..., slots:], o.additional_values
            )
        outputs.append(output)
        lses.append(lse)
    grid = query.shape[:-1]
    if not outputs:
        return query.new_zeros(*grid, value.shape[-1]), o.query.new_zeros(grid)
    return (
        torch.cat(outputs, dim=1).reshape(*grid, value.shape[-1]).to(query.dtype),
        torch.cat(lses, dim=1).reshape(grid),
    )


@without_autocast
def backward(
    operands: Operands,
    d_output: Tensor,
    d_lse: Tensor | None,
    flat_axes: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward` for each of the operands.

    Written out, and not left to autograd, so that it too needs the memory of one chunk only. Differentiable itself.
    """
    query, key, value, additional_keys, additional_values, rpb = operands
    o = _computed(operands, flat_axes, scale)
    d_outputs = d_output.to(o.query.dtype).reshape(*o.query.shape[:-1], value.shape[-1])
    d_queries = []
    d_key, d_value = torch.zeros_like(o.key), torch.zeros_like(o.value)
    d_more_keys = None if o.additional_keys is None else torch.zeros_like(o.additional_keys)
    d_more_values = None if o.additional_values is None else torch.zeros_like(o.additional_values)
    d_rpb = None if o.rpb is None else torch.zeros_like(o.rpb)
    for chunk in o.chunks():
        keys, values = chunk.gather(o.key), chunk.gather(o.value)
        weights, _ = o.weights(chunk, keys)
        slots = chunk.keys.shape[1]
        chunk_query, d_out = o.query[:, chunk.queries], d_outputs[:, chunk.queries]
        d_weights = torch.einsum("bqhgd,bqwhd->bqhgw", d_out, values)
        if o.additional_values is not None:
            dense = torch.einsum("bqhgd,bnhd->bqhgn", d_out, o.additional_values)
            d_weights = torch.cat([d_weights, dense], dim=-1)
        delta = (weights * d_weights).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            d_lses = d_lse.to(delta.dtype).reshape(o.query.shape[:-1])
            delta = delta - d_lses[:, chunk.queries, ..., None]
        d_logits = weights * (d_weights - delta)
        # An empty slot's weight is 0, but not 0 times a NaN of the query's own.
        window = d_logits[..., :slots].masked_fill(~chunk.present[:, None, None], 0)
        d_query = torch.einsum("bqhgw,bqwhd->bqhgd", window, keys)
        d_key = chunk.scatter(d_key, torch.einsum("bqhgw,bqhgd->bqwhd", window, chunk_query))
        d_value = chunk.scatter(
            d_value, torch.einsum("bqhgw,bqhgd->bqwhd", weights[..., :slots], d_out)
        )
        if d_rpb is not None:
            d_rpb = chunk.add_to_bias(d_rpb, window.sum(dim=0).permute(1, 2, 0, 3))
        if o.additional_keys is not None and d_more_keys is not None and d_more_values is not None:
            dense = d_logits[..., slots:]
            d_query = d_query + torch.einsum("bqhgn,bnhd->bqhgd", dense, o.additional_keys)
            d_more_keys = d_more_keys + torch.einsum("bqhgn,bqhgd->bnhd", dense, chunk_query)
            d_more_values = d_more_values + torch.einsum(
                "bqhgn,bqhgd->bnhd", weights[..., slots:], d_out
            )
        d_queries.append(d_query)

    def like(gradient: Tensor | None, tensor: Tensor | None, factor: float = 1.0) -> Tensor | None:
        if gradient is None or tensor is None:
            return None
        return (gradient * factor).reshape(tensor.shape).to(tensor.dtype)

    d_query = torch.cat(d_queries, dim=1) if d_queries else torch.zeros_like(o.query)
    return (
        (d_query * scale).reshape(query.shape).to(query.dtype),
        (d_key * scale).reshape(key.shape).to(key.dtype),
        d_value.reshape(value.shape).to(value.dtype),
        like(d_more_keys, additional_keys, scale),
        like(d_more_values, additional_values),
        like(d_rpb, rpb),
    )
