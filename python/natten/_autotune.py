# SPDX-License-Identifier: MIT
"""Tile shapes of CUDA kernels, searched for by time where `natten.use_autotuner` asks for it.

Tried are boxes of as many tokens as the kernels are compiled for: of each kernel the few that visit the fewest tiles, in
thorough mode all. What was fastest is kept in memory, and on disk for the next process.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from natten import _C, _dispatch, _ops, _tile_cache
from natten._axes import Axis
from natten._problem import Operands, Problem
from natten._settings import AutotunerContext

# Of each kernel, unless all are tried: the exact cost leaves open only what caches and the scheduler make of it.
_QUICK = 4

_Shape = tuple[int, ...]
# Of tiles of queries, and of keys.
_Pair = tuple[_Shape, _Shape]

_lock = threading.Lock()
_chosen: dict[tuple[Problem, str, bool], tuple[int, ...]] = {}
_dispatch.caches_of_choices.append(_chosen.clear)


def tile_shapes(
    problem: Problem, backend: str, needs_grad: bool, operands: Operands
) -> tuple[int, ...]:
    """The shapes to run a problem with, as the ops take them; () leaves them to be chosen by cost.

    The first call with a problem may run it many times. Only where that is harmless: not in a graph being traced or
    captured, not under a transform, and not while somebody watches every op.
    """
    if (
        backend == "reference"
        or torch.compiler.is_compiling()
        or type(operands.query) not in (Tensor, nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or (operands.query.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return ()
    key = problem, backend, needs_grad
    found = _chosen.get(key)
    if found is None:
        with _lock, torch.no_grad():
            found = _of_both_directions(problem, backend, needs_grad, operands)
            _chosen[key] = found
    return found


def _of_both_directions(
    problem: Problem, backend: str, needs_grad: bool, operands: Operands
) -> tuple[int, ...]:
    context = AutotunerContext
    rank = problem.rank
    forward = backward = (0,) * 2 * rank
    settings = problem.flat_axes, problem.scale, backend
    if context.enabled_for_forward:
        forward = _search(
            "forward",
            problem,
            backend,
            operands,
            lambda shapes: _ops.FORWARD(*operands, *settings, shapes),
            context.thorough_mode_forward,
            context.warmup_steps_forward,
            context.steps_forward,
        )
    if context.enabled_for_backward and needs_grad:
        output, lse = _ops.FORWARD(*operands, *settings)
        backward = _search(
            "backward",
            problem,
            backend,
            operands,
            lambda shapes: _ops.BACKWARD(*operands, output, lse, output, None, *settings, shapes),
            context.thorough_mode_backward,
            context.warmup_steps_backward,
            context.steps_backward,
        )
    shapes = forward + backward
    return shapes if any(shapes) else ()


def _search(
    op: str,
    problem: Problem,
    backend: str,
    operands: Operands,
    run: Callable[[tuple[int, ...]], Any],
    is_thorough: bool,
    warmup: int,
    steps: int,
) -> tuple[int, ...]:
    """The fastest shapes of one direction, of queries and then of keys; zeros if there is no choice."""
    rank = problem.rank
    nothing = (0,) * 2 * rank
    kernels = _tiled_kernels(op, problem, backend, operands)
    if not kernels:
        return nothing
    key = _key(op, problem, backend, [kernel.name for kernel in kernels], is_thorough)
    tiles = [kernel.tile for kernel in kernels]
    possible = {*tiles, *(tile[::-1] for tile in tiles if op == "backward")}
    known = _tile_cache.find(key)
    # Shapes that no kernel has tiles for are not what was found here, whoever wrote them.
    if (
        known is not None
        and len(known) == 2 * rank
        and (math.prod(known[:rank]), math.prod(known[rank:])) in possible
    ):
        return known
    times = {}
    for pair in _pairs(op, problem.axes, tiles, None if is_thorough else _QUICK):
        flat = pair[0] + pair[1]
        shapes = nothing + flat if op == "backward" else flat + nothing
        times[flat] = _seconds(partial(run, shapes), problem.device, warmup, steps)
    best = min(times, key=times.__getitem__)
    _tile_cache.keep(key, best)
    return best


def _tiled_kernels(op: str, problem: Problem, backend: str, operands: Operands) -> list[_C.Kernel]:
    """The kernels to choose from: for the same head dim as the best, and of the same tiles only the best."""
    core, chosen, _ = _ops.launch(op, backend, operands, problem.flat_axes, problem.scale)
    if chosen is None:
        return []
    arch = _dispatch.arch_of(problem.device) or 0
    rows = _C.candidates(core, op, backend, _dispatch.forced_isa(), arch)
    able = [kernel for kernel, reasons in rows if not reasons]
    by_tile: dict[tuple[int, int], _C.Kernel] = {}
    for kernel in able:
        if kernel.tile != (0, 0) and kernel.max_head_dim == able[0].max_head_dim:
            by_tile.setdefault(kernel.tile, kernel)
    return list(by_tile.values()) if able[0].tile in by_tile else []


def _pairs(
    op: str, axes: tuple[Axis, ...], tiles: list[tuple[int, int]], count: int | None
) -> list[_Pair]:
    """Shapes to try, for each size of tiles the `count` cheapest.

    A backward kernel goes over the tiles of queries, and of keys. Where those it owns and those it streams differ in
    size, a pair of shapes is for one of the passes only, and the other follows by cost.
    """
    pairs: list[_Pair] = []
    for own, streamed in tiles:
        passes = [(own, streamed)]
        if op == "backward" and own != streamed:
            passes.append((streamed, own))
        for of_queries, of_keys in passes:
            key_boxes = _boxes(of_keys, len(axes))
            found = [(q, k) for q in _boxes(of_queries, len(axes)) for k in key_boxes]
            if count is not None:
                sides = [of_queries == own] + [of_keys == own] * (op == "backward")
                costs = {pair: _visited(axes, pair, sides) for pair in found}
                found = sorted(found, key=costs.__getitem__)[:count]
            pairs += found
    return pairs


def _boxes(tokens: int, rank: int) -> list[_Shape]:
    """All boxes of so many tokens whose sides are powers of two."""
    sides = [1 << i for i in range(tokens.bit_length())]
    return [shape for shape in product(sides, repeat=rank) if math.prod(shape) == tokens]


def _visited(axes: tuple[Axis, ...], pair: _Pair, is_pass: list[bool]) -> int:
    """Tiles that are visited, in the pass over tiles of queries, and in that over tiles of keys, if they are."""
    count = 0
    for of_keys, is_done in enumerate(is_pass):
        own, streamed = pair[::-1] if of_keys else pair
        sides = zip(axes, own, streamed, strict=True)
        count += is_done * math.prod(_visited_on(*side, bool(of_keys)) for side in sides)
    return count


@lru_cache(maxsize=4096)
def _visited_on(axis: Axis, own: int, streamed: int, of_keys: bool) -> int:
    """Streamed tiles of an axis that its own tiles visit."""
    return sum(max(0, -(-(end - begin) // streamed)) for begin, end in _streams(axis, own, of_keys))


@lru_cache(maxsize=256)
def _streams(axis: Axis, own: int, of_keys: bool) -> list[tuple[int, int]]:
    return [(box[3], box[4]) for box in _C.tile_boxes(axis, own, of_keys)]


def _seconds(run: Callable[[], Any], device: torch.device, warmup: int, steps: int) -> float:
    """What a run takes: the median of `steps`."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(warmup):
        run()
    times = []
    for _ in range(steps):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times)


def _key(op: str, problem: Problem, backend: str, kernels: list[str], is_thorough: bool) -> str:
    """All that the fastest shapes depend on: in another build, other kernels."""
    is_gpu = problem.device.type == "cuda"
    facts = {
        "op": op,
        "device": torch.cuda.get_device_name(problem.device) if is_gpu else problem.device.type,
        "backend": backend,
        "kernels": kernels,
        "dtype": str(problem.dtype),
        "axes": problem.flat_axes,
        "batch": problem.batch,
        "heads": (problem.heads, problem.heads_kv),
        "head_dims": (problem.head_dim, problem.head_dim_value),
        "additional_keys": problem.additional_keys,
        "rpb": problem.has_rpb,
        "thorough": is_thorough,
    }
    return json.dumps(facts)
