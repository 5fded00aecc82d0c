# SPDX-License-Identifier: MIT
"""The unfused operations by brute force, in their storage order. Shares nothing with what it checks."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cases import Problem
from tests.oracle import window


class Slots(NamedTuple):
    """What the slots of each query hold; queries and keys are numbered row by row."""

    keys: Tensor  # [query, slot] the key, or 0
    entries: Tensor  # [query, slot] its place in the flat bias table, or 0
    present: Tensor  # [query, slot] whether there is a key
    counted: Tensor  # [query, slot] whether there is a key, or a missing one that counts


def slots(problem: Problem) -> Slots:
    """What is in them, on the device that tensors are made on."""
    table = _slots(problem).to(torch.get_default_device())
    keys, entries, present, counted = table.unbind(-1)
    return Slots(keys, entries, present.bool(), counted.bool())


@functools.lru_cache(maxsize=512)
def _slots(problem: Problem) -> Tensor:
    """Query by query and slot by slot; on the CPU."""
    rows = []
    for query in itertools.product(*(problem._queries(i) for i in range(len(problem.grid)))):
        windows = [
            window(
                problem.grid[i],
                problem.kernel_size[i],
                problem.stride[i],
                problem.dilation[i],
                problem.is_causal[i],
                problem.boundary[i],
                problem.offset[i],
                token,
            )
            for i, token in enumerate(query)
        ]
        row = []
        for places in itertools.product(*map(range, problem.kernel_size)):
            key = entry = 0
            present = counted = True
            for i, place in enumerate(places):
                tokens, count = windows[i]
                present &= place < len(tokens)
                counted &= place < count
                token = tokens[min(place, len(tokens) - 1)] if tokens else 0
                origin, extent = problem.key_box[i]
                step = token // problem.dilation[i] - query[i] // problem.dilation[i]
                size = problem.kernel_size[i]
                key = key * extent + token - origin
                entry = entry * (2 * size - 1) + step + size - 1
            row.append((key, entry, True, counted) if present else (0, 0, False, counted))
        rows.append(row)
    shape = (-1, math.prod(problem.kernel_size), 4)
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(shape)


def heads_first(operands):
    """Query, key, value, additional keys, additional values and bias of a problem, as the unfused operations want them."""
    *tokens, rpb = operands
    return (*(None if t is None else t.movedim(-2, 1) for t in tokens), rpb)


def queries_only(problem: Problem, query: Tensor) -> Tensor:
    """Without the tokens that are no queries, as boundary "valid" says."""
    for dim, extent in enumerate(problem.output_grid):
        query = query.narrow(2 + dim, problem.first_query(dim), extent)
    return query


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """[batch, heads, key, head_dim]."""
    return tensor.flatten(2, -2).repeat_interleave(heads // tensor.shape[1], 1)


def qk(problem: Problem, query, key, additional_keys=None, rpb=None, unused=-math.inf) -> Tensor:
    """Weights before the softmax. Differentiable."""
    at = slots(problem)
    query = queries_only(problem, query)
    heads = query.shape[1]
    rows = query.flatten(2, -2)
    weights = torch.einsum("bhqd,bhqwd->bhqw", rows, _grouped(key, heads)[:, :, at.keys])
    if rpb is not None:
        weights = weights + rpb.to(weights).flatten(1)[:, at.entries]
    weights = weights.where(at.present, torch.where(at.counted, 0.0, unused).to(weights))
    weights = weights.reshape(*query.shape[:-1], weights.shape[-1])
    if additional_keys is None:
        return weights
    more = torch.einsum("bhqd,bhnd->bhqn", rows, _grouped(additional_keys, heads))
    return torch.cat([weights, more.reshape(*query.shape[:-1], more.shape[-1])], -1)


def av(problem: Problem, attn, value, additional_values=None) -> Tensor:
    """Sums of values by weights. Differentiable."""
    at = slots(problem)
    heads, rows = attn.shape[1], attn.flatten(2, -2)
    count = at.keys.shape[1]
    weights = rows[..., :count].where(at.present, torch.zeros((), dtype=rows.dtype))
    output = torch.einsum("bhqw,bhqwd->bhqd", weights, _grouped(value, heads)[:, :, at.keys])
    if additional_values is not None:
        more = _grouped(additional_values, heads)
        output = output + torch.einsum("bhqn,bhnd->bhqd", rows[..., count:], more)
    return output.reshape(*attn.shape[:-1], value.shape[-1])
