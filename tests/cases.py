# SPDX-License-Identifier: MIT
"""The problems that tests check: the benchmark's named ones, and random ones with given features."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import CASES as NAMED

__all__ = ["FEATURES", "NAMED", "PAIRS", "Problem", "named_problem", "random_problem"]

# What a random problem can be asked to have.
FEATURES = (
    "rank1",
    "rank2",
    "rank3",
    "even",
    "stride",
    "dilation",
    "causal",
    "mask",
    "zeros",
    "valid",
    "offset",
    "boxes",
    "whole",
    "gqa",
    "value_dim",
    "additional",
    "rpb",
    "strided",
    "huge",
    "scale",
    "batch",
)
RANKS = FEATURES[:3]
PAIRS = tuple(pair for pair in itertools.combinations(FEATURES, 2) if not set(pair) <= set(RANKS))


@dataclass(frozen=True)
class Problem:
    """A call, as plain values: one per axis where that is possible."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    boundary: tuple[str, ...]
    offset: tuple[int, ...]
    query_box: tuple[tuple[int, int], ...]  # (origin, extent)
    key_box: tuple[tuple[int, int], ...]
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 16
    head_dim_value: int = 16
    additional: int = 0
    has_rpb: bool = False
    strided: bool = False
    magnitude: float = 1.0
    scale: float | None = None
    seed: int = field(default=0, compare=True)

    @property
    def scale_value(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def _queries(self, dim: int) -> range:
        """Tokens of the grid that are queries."""
        origin, extent = self.query_box[dim]
        if self.boundary[dim] != "valid":
            return range(origin, origin + extent)
        left = (self.kernel_size[dim] // 2) * self.dilation[dim]
        right = (self.kernel_size[dim] - 1) * self.dilation[dim] - left
        end = origin + extent
        return range(min(max(origin, left), end), min(end, self.grid[dim] - right))

    @property
    def output_grid(self) -> tuple[int, ...]:
        return tuple(len(self._queries(dim)) for dim in range(len(self.grid)))

    def first_query(self, dim: int) -> int:
        """Tokens of the query tensor before the first that is a query."""
        return self._queries(dim).start - self.query_box[dim][0]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the call, without the tensors."""
        arguments: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "kernel_size",
                "stride",
                "dilation",
                "is_causal",
                "boundary",
                "offset",
                "scale",
            )
        }
        whole = tuple((0, extent) for extent in self.grid)
        if self.query_box != whole or self.key_box != whole:
            arguments["grid"] = self.grid
            arguments["query_origin"] = tuple(origin for origin, _ in self.query_box)
            arguments["key_origin"] = tuple(origin for origin, _ in self.key_box)
        return arguments

    def operands(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Random query, key, value, additional_keys, additional_values and rpb; some None."""
        device = torch.get_default_device()
        generator = torch.Generator().manual_seed(self.seed)

        def tensor(*shape: int, magnitude: float = 1.0) -> torch.Tensor:
            settings = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
            numbers = (torch.randn(shape, **settings) * magnitude).to(dtype).to(device)
            if self.strided and len(shape) > 3:
                # As a view of packed heads-first memory: [batch, heads, *grid, head_dim + 3].
                packed = torch.nn.functional.pad(numbers.movedim(-2, 1), (1, 2))
                return packed.contiguous()[..., 1:-2].movedim(1, -2)
            return numbers

        queries = tuple(extent for _, extent in self.query_box)
        keys = tuple(extent for _, extent in self.key_box)
        extra: tuple[torch.Tensor | None, ...] = (None, None)
        found = [
            tensor(self.batch, *queries, self.heads, self.head_dim, magnitude=self.magnitude),
            tensor(self.batch, *keys, self.heads_kv, self.head_dim),
            tensor(self.batch, *keys, self.heads_kv, self.head_dim_value),
        ]
        if self.additional:
            extra = (
                tensor(self.batch, self.additional, self.heads_kv, self.head_dim),
                tensor(self.batch, self.additional, self.heads_kv, self.head_dim_value),
            )
        rpb = None
        if self.has_rpb:
            # Always of LSE's type: what autocast and old checkpoints do is tested apart.
            rpb = tensor(self.heads, *(2 * size - 1 for size in self.kernel_size))
            rpb = rpb.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return (*found, *extra, rpb)


def _reach(problem: Problem, dim: int) -> tuple[int, int]:
    """First and last token that the queries of an axis attend to."""
    from tests.oracle import window

    settings = (
        problem.grid[dim],
        problem.kernel_size[dim],
        problem.stride[dim],
        problem.dilation[dim],
        problem.is_causal[dim],
        problem.boundary[dim],
        problem.offset[dim],
    )
    tokens = [key for query in problem._queries(dim) for key in window(*settings, query)[0]]
    return (min(tokens), max(tokens)) if tokens else (0, 0)


def random_problem(features: tuple[str, ...], seed: int, large: bool = False) -> Problem:
    """A problem with the given features, and with whatever else chance adds.

    A small one spans a tile or two of a kernel; a large one, many.
    """
    rng = random.Random(f"{features}{seed}")
    has = set(features)

    def chance(feature: str, probability: float) -> bool:
        return feature in has or rng.random() < probability

    rank = next(
        (RANKS.index(name) + 1 for name in features if name in RANKS), rng.choice((1, 2, 2, 3))
    )
    valid = "valid" in has
    # "valid" wants stride 1 and no causality on its axis: what it is paired with goes to another axis.
    if valid and has & {"stride", "causal", "offset", "mask", "zeros"}:
        rank = max(rank, 2)
    marked = rng.randrange(rank)  # the axis that surely has the features
    valid_axis = (marked + 1) % rank if valid else None
    zeros_axis = (marked + 1) % rank if {"mask", "zeros"} <= has and rank > 1 else marked
    longest = ((48, 14, 8), (900, 40, 13))[large][rank - 1]
    widest = ((12, 6, 4), (150, 15, 6))[large][rank - 1]

    axes = []
    for i in range(rank):
        sure = has if i == marked else set()

        def here(feature: str, probability: float, sure: set[str] = sure) -> bool:
            return feature in sure or rng.random() < probability

        is_valid = i == valid_axis or (not features and rng.random() < 0.05)
        kernel_size = rng.randint(1, widest)
        if here("even", 0.3):
            kernel_size += kernel_size % 2
        dilation = rng.choice((2, 2, 3)) if here("dilation", 0.2) else 1
        stride, offset, causal = 1, 0, False
        boundary = "shift"
        if is_valid:
            boundary = "valid"
        else:
            if here("stride", 0.25) or "offset" in sure:
                kernel_size = max(kernel_size, 2)
                kernel_size += kernel_size % 2 if "even" in sure else 0
                stride = rng.randint(2, kernel_size)
            if here("offset", 0.1) and stride > 1:
                offset = rng.randint(1, stride - 1)
            causal = here("causal", 0.2)
            if i == zeros_axis and "zeros" in has:
                boundary = "zeros"
            elif "mask" in sure:
                boundary = "mask"
            elif rng.random() < 0.3:
                boundary = rng.choice(("mask", "zeros"))
        least = kernel_size * dilation if boundary == "shift" else 1
        if boundary == "valid":
            least = (kernel_size - 1) * dilation + 1
        extent = rng.randint(least, max(least, longest))
        if "whole" in sure and boundary == "shift" and dilation == 1:
            kernel_size = extent = min(extent, 16)
        axes.append((extent, kernel_size, stride, dilation, causal, boundary, offset))

    columns = [tuple(column) for column in zip(*axes, strict=True)]
    whole = tuple((0, axis[0]) for axis in axes)
    heads_kv = rng.choice((1, 2))
    head_dim = rng.choice((1, 3, 8, 16, 20, 32, 40, 64, 72))
    problem = Problem(
        *columns,
        query_box=whole,
        key_box=whole,
        batch=rng.choice((2, 3)) if chance("batch", 0.2) else 1,
        heads=heads_kv * (rng.choice((2, 3)) if chance("gqa", 0.25) else 1),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_value=rng.choice((5, 24, 48)) if chance("value_dim", 0.25) else head_dim,
        additional=rng.randint(1, 20) if chance("additional", 0.2) else 0,
        has_rpb=chance("rpb", 0.3),
        strided=chance("strided", 0.25),
        magnitude=30.0 if chance("huge", 0.05) else 1.0,
        scale=rng.choice((0.0, 0.5, -0.3)) if chance("scale", 0.1) else None,
        seed=rng.randrange(2**31),
    )
    return _with_boxes(problem, rng) if chance("boxes", 0.15) else problem


def _with_boxes(problem: Problem, rng: random.Random) -> Problem:
    from dataclasses import replace

    boxes = []
    for extent in problem.grid:
        size = rng.randint(1, extent)
        boxes.append((rng.randint(0, extent - size), size))
    problem = replace(problem, query_box=tuple(boxes))
    keys = []
    for dim, extent in enumerate(problem.grid):
        first, last = _reach(problem, dim)
        first, last = rng.randint(0, first), rng.randint(last, extent - 1)
        keys.append((first, last - first + 1))
    return replace(problem, key_box=tuple(keys))


def named_problem(case: Any, **changes: Any) -> Problem:
    """A problem of the benchmark."""
    rank = len(case.grid)
    whole = tuple((0, extent) for extent in case.grid)
    settings: dict[str, Any] = {
        "grid": case.grid,
        "kernel_size": case.kernel_size,
        "stride": (1,) * rank,
        "dilation": (1,) * rank,
        "is_causal": (False,) * rank,
        "boundary": ("shift",) * rank,
        "offset": (0,) * rank,
        "query_box": whole,
        "key_box": whole,
        "batch": case.batch,
        "heads": case.heads,
        "heads_kv": case.heads,
    }
    return Problem(**{**settings, **changes})


def size(problem: Problem) -> int:
    """Entries of the dense attention matrix of a head."""
    return math.prod(problem.output_grid) * math.prod(extent for _, extent in problem.key_box)
