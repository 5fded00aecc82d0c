# SPDX-License-Identifier: MIT
"""From an op and its tensors' shapes to the kernel that runs it, and to the problem as the core sees it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from natten import _C, _dispatch
from natten._dispatch import Candidate
from natten._errors import reject
from natten._signature import axes_of, check_infos, infos_of


class Launch(NamedTuple):
    """What the ops hand to the core; no kernel at all where there is nothing to compute."""

    problem: _C.Problem
    kernel: str | None
    workspace_bytes: int


_able: dict[tuple[Any, ...], list[_C.Kernel]] = {}


@lru_cache(maxsize=1024)
def launch(
    op: str,
    backend: str,
    isa: str,
    flat_axes: tuple[int, ...],
    heads_kv: int | None,
    scale: float,
    arch: int,
    allow_tf32: bool,
    tile_shapes: tuple[int, ...],
    *facts: Any,
) -> Launch:
    """The problem as the core sees it, and the kernel that runs `op` of it.

    `heads_kv` is for the op that has no tensor of keys. `tile_shapes`, if there are any, are as `normalize_tile_shapes`
    puts them, and `facts` are those of the op's tensors, in their order, as `facts_of` puts them.

    Raises:
        ArgumentError: If the tensors do not fit the axes or each other: the core would read out of bounds. If the kernel
            does not take these tiles.
        NotImplementedError: If no kernel of the backend can run it.
    """
    axes = axes_of(flat_axes)
    known = {} if heads_kv is None else {"heads_kv": heads_kv}
    sizes = check_infos(op, infos_of(facts), axes, **known)
    if tile_shapes and (
        len(tile_shapes) != 4 * len(axes) or min(tile_shapes) < 0 or max(tile_shapes) >= 2**31
    ):
        reject(
            "tile_shapes",
            tile_shapes,
            f"{4 * len(axes)} sides, each at least 1, or 0 where any will do",
        )
    half = len(tile_shapes) // 2
    tile_shapes = tile_shapes[half:] if op == "backward" else tile_shapes[:half]
    problem = _C.Problem(
        str(sizes.dtype).removeprefix("torch."),
        flat_axes,
        *sizes[1:],
        scale,
        allow_tf32,
        tile_shapes,
    )
    kind = (
        op,
        backend,
        isa,
        sizes.dtype,
        sizes.head_dim,
        sizes.head_dim_value,
        sizes.has_rpb,
        arch,
        allow_tf32,
    )
    able = _able.get(kind)
    if able is None:
        able = _find_able(problem, op, backend, isa, arch)
        _dispatch.remember(_able, kind, able)
    # Dense attention to an empty sequence is the one problem that has queries, but no keys.
    has_keys = sizes.additional_keys > 0 or all(axis.key_extent > 0 for axis in axes)
    if sizes.batch == 0 or any(axis.query_extent == 0 for axis in axes) or not has_keys:
        return Launch(problem, None, 0)
    chosen = _with_tiles(op, tile_shapes, able).name if any(tile_shapes) else able[0].name
    return Launch(problem, chosen, _C.workspace_bytes(problem, op, chosen, arch))


_dispatch.caches_of_choices += [launch.cache_clear, _able.clear]


def _find_able(problem: _C.Problem, op: str, backend: str, isa: str, arch: int) -> list[_C.Kernel]:
    """The kernels that can run a problem, and all of its kind, best first."""
    rows = [
        (kernel, (*reasons, *_dispatch.switched_off(kernel.backend, op, backend)))
        for kernel, reasons in _C.candidates(problem, op, backend, isa, arch)
    ]
    able = [kernel for kernel, reasons in rows if not reasons]
    if not able:
        found = [Candidate(kernel.backend, kernel.name, why) for kernel, why in rows]
        raise _dispatch.nothing_runs(backend, found)
    return able


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
