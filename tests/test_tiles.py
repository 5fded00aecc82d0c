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


def pairs_of_long_axis(extent: int, kernel_size: int, is_causal: bool) -> int:
    """With stride and dilation 1, and boundary "mask"."""
    before = kernel_size - 1 if is_causal else kernel_size // 2
    after = kernel_size - 1 - before
    return extent * kernel_size - before * (before + 1) // 2 - after * (after + 1) // 2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 6, 4097, 2**28])
def test_the_longest_axis_is_planned(kernel_size: int, is_causal: bool) -> None:
    """What would take minutes if every token were looked at."""
    axis = Axis(2**29, kernel_size, is_causal=is_causal, boundary="mask")
    assert _C.attended_pairs(axis.ints()) == pairs_of_long_axis(2**29, kernel_size, is_causal)
    problem = _C.Problem("float32", axis.ints(), 1, 1, 1, 32, 32, 0, False, 1.0)
    assert isinstance(problem.queries_slide, bool)
    for of_keys in (False, True):
        own, streamed = problem.tile_shapes(of_keys, 64, 32)
        assert (math.prod(own), math.prod(streamed)) == (64, 32)
    many_groups = Axis(2**29, 2, dilation=2**27)
    assert _C.attended_pairs(many_groups.ints()) == 2 * 2**29
    assert _C.attended_tokens(many_groups.ints()) == (0, 2**29 - 1)


def test_queries_of_long_lines_slide_only_where_they_can() -> None:
    """Where tiles are too many to look at each, the formula agrees with looking at each."""
    random.seed(3)
    outcomes = set()
    for _ in range(12):
        stride = random.choice((1, 1, 2, 3, 4, 8, 16))
        kernel_size = random.randint(stride, 64)
        boundary, is_causal = random.choice(("shift", "mask")), random.random() < 0.5
        offset = random.randrange(stride)
        # So many tiles that none is looked at, and so few tokens that all can be here.
        axis = Axis(16 * 1025, kernel_size, stride, 1, is_causal, boundary, offset)
        begins = [begin for _, begin, *_ in _C.windows(axis.ints())]
        possible = all(
            begins[min(i + 15, len(begins) - 1)] - begins[i] < 16 for i in range(0, len(begins), 16)
        )
        problem = _C.Problem("float32", axis.ints(), 1, 1, 1, 32, 32, 0, False, 1.0)
        assert problem.queries_slide == possible, f"{axis}"  # a line: no box streams less
        outcomes.add(possible)
    assert outcomes == {False, True}
