# SPDX-License-Identifier: MIT
"""From an op and its tensors' shapes to the kernel that runs it, and to the problem as the core sees it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch

from natten import _C, _dispatch
from natten._axes import AXIS_INTS, Axis
from natten._dispatch import FUSED_OPS, Candidate
from natten._errors import reject

_Shape: TypeAlias = "tuple[int, ...] | None"  # None: there is no such tensor


class Launch(NamedTuple):
    """What the ops hand to the core; no kernel at all where there is nothing to compute."""

    problem: _C.Problem
    kernel: str | None
    workspace_bytes: int


class _Sizes(NamedTuple):
    """What the shapes of the tensors say beside the axes."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_value: int
    additional_keys: int


@lru_cache(maxsize=1024)
def launch(
    op: str,
    backend: str,
    isa: str,
    dtype: torch.dtype,
    flat_axes: tuple[int, ...],
    shapes: tuple[_Shape, ...],
    scale: float,
    arch: int,
    allow_tf32: bool,
    tile_shapes: tuple[int, ...] = (),
) -> Launch:
    """The problem as the core sees it, and the kernel that runs `op` of it.

    `shapes` are those of the operands of attention; of an unfused op, those of query, key, weights and bias.
    `tile_shapes`, if there are any, are as `normalize_tile_shapes` puts them.

    Raises:
        ArgumentError: If the shapes do not fit the axes or each other: the core would read out of bounds. If the kernel
            does not take these tiles.
        NotImplementedError: If no kernel of the backend can run it.
    """
    axes = [Axis(*flat_axes[i : i + AXIS_INTS]) for i in range(0, len(flat_axes), AXIS_INTS)]
    sizes, fitting = (_fit if op in FUSED_OPS else _fit_unfused)(axes, *shapes)
    if shapes != fitting:
        reject("shapes of the operands", shapes, f"{fitting}, by the axes {axes}")
    half = len(tile_shapes) // 2
    tile_shapes = tile_shapes[half:] if op == "backward" else tile_shapes[:half]
    problem = _C.Problem(
        str(dtype).removeprefix("torch."),
        flat_axes,
        *sizes,
        shapes[-1] is not None,
        scale,
        allow_tf32,
        tile_shapes,
    )
    rows = [
        (kernel, (*reasons, *_dispatch.switched_off(kernel.backend, op, backend)))
        for kernel, reasons in _C.candidates(problem, op, backend, isa, arch)
    ]
    able = [kernel for kernel, reasons in rows if not reasons]
    if not able:
        found = [Candidate(kernel.backend, kernel.name, why) for kernel, why in rows]
        raise _dispatch.nothing_runs(backend, found)
    # Dense attention to an empty sequence is the one problem that has queries, but no keys.
    has_keys = sizes.additional_keys > 0 or all(axis.key_extent > 0 for axis in axes)
    if 0 in sizes[:-1] or any(axis.query_extent == 0 for axis in axes) or not has_keys:
        return Launch(problem, None, 0)
    chosen = _with_tiles(op, tile_shapes, able).name if any(tile_shapes) else able[0].name
    return Launch(problem, chosen, _C.workspace_bytes(problem, op, chosen, arch))


_dispatch.caches_of_choices.append(launch.cache_clear)


def _fit(
    axes: list[Axis],
    query: _Shape,
    key: _Shape,
    value: _Shape,
    additional_keys: _Shape,
    _: _Shape,
    rpb: _Shape,
) -> tuple[_Sizes, tuple[_Shape, ...]]:
    """The sizes that some of the shapes tell, and the shapes that fit them all."""
    assert query is not None
    assert key is not None
    assert value is not None
    batch, heads, head_dim = query[0], query[-2], query[-1]
    heads_kv, head_dim_value = key[-2], value[-1]
    additional = 0 if additional_keys is None else additional_keys[1]
    keys = tuple(axis.key_extent for axis in axes)
    fitting = (
        (batch, *(axis.query_extent for axis in axes), heads, head_dim),
        (batch, *keys, heads_kv, head_dim),
        (batch, *keys, heads_kv, head_dim_value),
        None if additional_keys is None else (batch, additional, heads_kv, head_dim),
        None if additional_keys is None else (batch, additional, heads_kv, head_dim_value),
        None if rpb is None else _table(heads, axes),
    )
    return _Sizes(batch, heads, heads_kv, head_dim, head_dim_value, additional), fitting


def _fit_unfused(
    axes: list[Axis], query: _Shape, key: _Shape, weights: _Shape, rpb: _Shape
) -> tuple[_Sizes, tuple[_Shape, ...]]:
    """The same of the unfused ops, heads first; the gradient of the bias has neither query nor key."""
    assert weights is not None
    batch, heads = weights[:2]
    heads_kv, head_dim = (heads, 1) if key is None else (key[1], key[-1])
    grid = tuple(axis.query_extent for axis in axes)
    fitting = (
        None if query is None else (batch, heads, *grid, head_dim),
        None if key is None else (batch, heads_kv, *(axis.key_extent for axis in axes), head_dim),
        (batch, heads, *grid, math.prod(axis.kernel_size for axis in axes)),
        None if rpb is None else _table(heads, axes),
    )
    return _Sizes(batch, heads, heads_kv, head_dim, head_dim, 0), fitting


def _table(heads: int, axes: list[Axis]) -> tuple[int, ...]:
    """The shape of the bias."""
    return (heads, *(2 * axis.kernel_size - 1 for axis in axes))


def _with_tiles(op: str, tile_shapes: tuple[int, ...], able: list[_C.Kernel]) -> _C.Kernel:
    """The best of the kernels that are `able` to run a problem which has tiles of these shapes.

    A CUDA kernel has tiles of the numbers of tokens that it was compiled for; where the best kernel has none, shapes
    say nothing. A backward kernel goes over its tiles twice, the second time with the roles of queries and keys
    exchanged: there, a shape counts for the pass, or both, where it has the right number of tokens.
    """
    if able[0].tile == (0, 0):
        return able[0]
    middle = len(tile_shapes) // 2
    shapes = tile_shapes[:middle], tile_shapes[middle:]
    tiled = [kernel for kernel in able if kernel.tile != (0, 0)]

    def takes(kernel: _C.Kernel) -> bool:
        possible = (kernel.tile, kernel.tile[::-1]) if op == "backward" else (kernel.tile,)
        return all(
            not any(shape) or any(math.prod(shape) == tile[side] for tile in possible)
            for side, shape in enumerate(shapes)
        )

    chosen = next(filter(takes, tiled), None)
    if chosen is None:
        prefix, conjunction = ("backward_", "or") if op == "backward" else ("", "and")
        reject(
            f"{prefix}q_tile_shape, {prefix}kv_tile_shape",
            " and ".join(f"{shape}" if any(shape) else "any" for shape in shapes),
            "boxes of as many tokens as a kernel is compiled for",
            "; ".join(f"{k.name} has {k.tile[0]} {conjunction} {k.tile[1]}" for k in tiled),
        )
    return chosen
