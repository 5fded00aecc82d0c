# SPDX-License-Identifier: MIT
"""Dense attention of one sequence, or of several packed one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor

from natten import _attend
from natten._errors import reject
from natten._problem import Operands


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | Tensor | None,
    backend: str | None,
    lengths: Tensor | None,
    lengths_kv: Tensor | None,
    bounds: Tensor | None,
    bounds_kv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; the last four are the seqlens_* and cumulative_seqlen_* arguments."""
    found = packed_bounds(query, key, value, lengths, lengths_kv, bounds, bounds_kv)
    if found is None:
        return _attend.dense(backend, Operands(query, key, value), is_causal, scale)
    starts, starts_kv = found
    parts = [
        _attend.dense(
            backend, Operands(query[:, a:b], key[:, c:d], value[:, c:d]), is_causal, scale
        )
        for a, b, c, d in zip(starts, starts[1:], starts_kv, starts_kv[1:], strict=False)
    ]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def packed_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    lengths_kv: Tensor | None,
    bounds: Tensor | None,
    bounds_kv: Tensor | None,
) -> tuple[list[int], list[int]] | None:
    """Where the sequences of queries and of keys begin, and where the last ones end; None if there is but one."""
    if lengths is None and lengths_kv is None and bounds is None and bounds_kv is None:
        return None
    if (lengths is None) != (lengths_kv is None) or (bounds is None) != (bounds_kv is None):
        reject("seqlens", "given for Q or KV only", "both, or cumulative_seqlen_* of both")
    if (lengths is None) == (bounds is None):
        reject("seqlens_*", "given beside cumulative_seqlen_*", "one of them")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_packed(name, tensor)
    starts = _starts("Q", lengths, bounds, query.shape[1])
    starts_kv = _starts("KV", lengths_kv, bounds_kv, key.shape[1])
    if len(starts) != len(starts_kv):
        reject("sequences in KV", len(starts_kv) - 1, f"{len(starts) - 1}, as many as in Q")
    return starts, starts_kv


def check_packed(name: str, tensor: Tensor) -> None:
    """Raises an error unless `tensor` may hold sequences one behind the other."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 4 or tensor.shape[0] != 1:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        reject(f"{name}.shape", got, "[1, total length, heads, head_dim]: packed sequences")


def _starts(which: str, lengths: Tensor | None, bounds: Tensor | None, total: int) -> list[int]:
    """Where the sequences begin, and where the last one ends."""
    given, name = (
        (lengths, f"seqlens_{which}") if bounds is None else (bounds, f"cumulative_seqlen_{which}")
    )
    if (
        not isinstance(given, Tensor)
        or given.dim() != 1
        or given.dtype not in (torch.int32, torch.int64)
        or given.is_meta
    ):
        reject(name, given, "a tensor of int32 with one dim, and with numbers in it")
    numbers: list[int] = given.tolist()
    if bounds is None:
        starts = [0]
        for length in numbers:
            starts.append(starts[-1] + length)
    else:
        starts = numbers
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        reject(
            name,
            numbers,
            f"lengths that are not negative and add up to {total}, at least one of them",
        )
    return starts
