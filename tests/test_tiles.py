# SPDX-License-Identifier: MIT
"""Tiles: their boxes on both sides, and the choice of their shapes, by brute force."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from natten import _C
from tests.test_window import Axis, definition, small_axes


def attending(axis: Axis) -> dict[int, dict[int, set[int]]]:
    """By dilation group and position of a key: positions of the queries that attend to it."""
    askers: dict[int, dict[int, set[int]]] = {}
    for token in axis.key_box:
        askers.setdefault(token % axis.dilation, {})[token // axis.dilation] = set()
    for token in axis.query_box:
        for key in definition(axis, token)[0]:
            askers[token % axis.dilation][key].add(token // axis.dilation)
    return askers


def check_key_tiles(axis: Axis, tile: int) -> None:
    """The queries that attend to any key of a tile, and those that attend to all of them."""
    boxes = iter(_C.tile_boxes(axis.ints(), tile, of_keys=True))
    for group, keys in sorted(attending(axis).items()):
        positions = sorted(keys)
        for first in range(0, len(positions), tile):
            own = positions[first : first + tile]
            got, begin, end, query, query_end, interior, interior_end = next(boxes)
            assert (got, begin, end) == (group, own[0], own[-1] + 1)
            askers = [keys[position] for position in own]
            union, common = set.union(*askers), set.intersection(*askers)
            if union:
                box = (min(union), max(union) + 1)
                assert (query, query_end) == box, f"{axis}: queries of keys {own}"
            else:
                assert query >= query_end, f"{axis}: nobody attends to keys {own}"
            # Among queries whose windows touch the tile: kernels look at no others.
            inside = set(range(max(interior, query), min(interior_end, query_end)))
            assert inside == common, f"{axis}: interior queries of keys {own}"
    assert next(boxes, None) is None


@pytest.mark.parametrize("extent", [1, 2, 5, 9, 14])
def test_key_tiles_of_small_axes(extent: int) -> None:
    random.seed(extent)
    axes = list(small_axes(extent))
    for axis in random.sample(axes, min(len(axes), 600)):
        check_key_tiles(axis, random.randint(1, 5))


def test_key_tiles_of_larger_axes() -> None:
    random.seed(0)
    for _ in range(40):
        boundary = random.choice(("shift", "mask", "zeros"))
        dilation, kernel_size = random.randint(1, 5), random.randint(1, 30)
        extent = random.randint(kernel_size * dilation, 300)
        stride, offset = random.randint(1, kernel_size), random.randint(-20, 20)
        axis = Axis(extent, kernel_size, stride, dilation, random.random() < 0.4, boundary, offset)
        check_key_tiles(axis, random.randint(1, 64))


def visited(axis: Axis, of_keys: bool, own: int, streamed: int) -> int:
    """Streamed tiles that the own tiles of dilation group 0 visit."""
    count = 0
    askers = attending(axis)[0]
    windows = {
        token // axis.dilation: set(definition(axis, token)[0])
        for token in axis.query_box
        if token % axis.dilation == 0
    }
    streams = askers if of_keys else windows
    positions = sorted(streams)
    for first in range(0, len(positions), own):
        stream = set.union(*(streams[position] for position in positions[first : first + own]))
        if stream:
            count += math.ceil((max(stream) + 1 - min(stream)) / streamed)
    return count


def factorisations(tokens: int, rank: int) -> list[tuple[int, ...]]:
    sides = [2**i for i in range(tokens.bit_length()) if 2**i <= tokens]
    return [shape for shape in product(sides, repeat=rank) if math.prod(shape) == tokens]


def random_axes(rank: int) -> list[Axis]:
    axes = []
    for _ in range(rank):
        dilation, kernel_size = random.choice((1, 1, 2)), random.randint(1, 9)
        extent = random.randint(kernel_size * dilation, (60, 30, 20)[rank - 1])
        stride, is_causal = random.randint(1, kernel_size), random.random() < 0.3
        boundary = random.choice(("shift", "mask"))
        axes.append(Axis(extent, kernel_size, stride, dilation, is_causal, boundary))
    return axes


def tile_shapes(axes, of_keys, own, streamed, wanted=()):
    ints = [number for axis in axes for number in axis.ints()]
    problem = _C.Problem("float16", ints, 1, 1, 1, 32, 32, 0, False, 1.0, False, wanted)
    return tuple(map(tuple, problem.tile_shapes(of_keys, own, streamed)))


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("sizes", [(64, 64), (64, 16), (16, 32), (128, 64)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_cost_least(rank: int, sizes: tuple[int, int], of_keys: bool) -> None:
    random.seed(rank)
    for _ in range(4):
        axes = random_axes(rank)
        per_axis = [
            {
                (own, streamed): visited(axis, of_keys, own, streamed)
                for own, streamed in product(*([2**i for i in range(8)],) * 2)
            }
            for axis in axes
        ]

        def cost(own, streamed, counts=per_axis):
            return math.prod(
                count[pair]
                for count, pair in zip(counts, zip(own, streamed, strict=True), strict=True)
            )

        own, streamed = tile_shapes(axes, of_keys, *sizes)
        assert (math.prod(own), math.prod(streamed)) == sizes
        every = list(product(*(factorisations(size, rank) for size in sizes)))
        assert cost(own, streamed) == min(cost(*pair) for pair in every), f"{axes}"
        # One of the two is given: the other is the best beside it.
        given = random.choice(factorisations(sizes[0], rank))
        wanted = [*(0,) * rank, *given] if of_keys else [*given, *(0,) * rank]
        own, streamed = tile_shapes(axes, of_keys, *sizes, wanted)
        assert own == given
        beside = factorisations(sizes[1], rank)
        assert cost(own, streamed) == min(cost(given, shape) for shape in beside), f"{axes}"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_queries_slide_where_it_costs_no_more(rank: int) -> None:
    """Slots of rows of 16 queries against the keys of the best box of 16, and whether a vector holds their first keys."""
    random.seed(rank)
    outcomes = set()
    for _ in range(60):
        axes = random_axes(rank)
        others, last = axes[:-1], axes[-1]
        groups = [range(g, last.extent, last.dilation) for g in range(last.dilation)]
        lines = [
            [
                [definition(last, token)[0] for token in group[i : i + 16]]
                for i in range(0, len(group), 16)
            ]
            for group in groups
        ]
        possible = all(
            max(keys[0] for keys in line) - line[0][0] < 16
            and (max(map(len, line)) <= 64 or all(axis.kernel_size == 1 for axis in others))
            for group in lines
            for line in group
        )
        slots = sum(max(map(len, line)) for line in lines[0])
        sliding = slots * math.prod(visited(axis, False, 1, 1) for axis in others)
        boxes = min(
            math.prod(visited(axis, False, size, 1) for axis, size in zip(axes, shape, strict=True))
            for shape in factorisations(16, rank)
        )
        ints = [number for axis in axes for number in axis.ints()]
        problem = _C.Problem("float32", ints, 1, 1, 1, 32, 32, 0, False, 1.0)
        assert problem.queries_slide == (possible and sliding <= boxes), f"{axes}"
        outcomes.add(problem.queries_slide)
    assert outcomes == {True, False} or rank == 1
