"""window.hpp against its definition, by brute force over every small axis."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest

from natten import _C

BOUNDARIES = ("shift", "mask", "zeros", "valid")


@dataclass(frozen=True)
class Axis:
    """One axis, with the boxes of it that the query and the key tensor hold (None: all)."""

    extent: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    boundary: str = "shift"
    offset: int = 0
    queries: tuple[int, int] | None = None
    keys: tuple[int, int] | None = None

    @property
    def query_box(self) -> range:
        return range(*(self.queries or (0, self.extent)))

    @property
    def key_box(self) -> range:
        return range(*(self.keys or (0, self.extent)))

    def ints(self) -> list[int]:
        return [
            self.extent,
            self.kernel_size,
            self.stride,
            self.dilation,
            int(self.is_causal),
            BOUNDARIES.index(self.boundary),
            self.offset,
            self.query_box.start,
            len(self.query_box),
            self.key_box.start,
            len(self.key_box),
        ]


def definition(axis: Axis, token: int) -> tuple[list[int], int]:
    """Positions of the keys that a token attends to, in its group, and how many the softmax counts.

    The one place besides window.hpp that says what a window is.
    """
    group, position = token % axis.dilation, token // axis.dilation
    length = len(range(group, axis.extent, axis.dilation))
    block = (position - axis.offset) // axis.stride * axis.stride + axis.offset
    leader = block + (axis.stride - 1 if axis.is_causal else axis.stride // 2)
    if axis.boundary == "shift":
        leader = min(leader, length - 1)
    if axis.is_causal:
        begin, end = leader - axis.kernel_size + 1, position + 1
    else:
        begin = leader - axis.kernel_size // 2
        if axis.boundary == "shift":
            begin = max(0, min(begin, length - axis.kernel_size))
        end = begin + axis.kernel_size
    there = [key for key in range(begin, end) if 0 <= key < length]
    return there, end - begin if axis.boundary == "zeros" else len(there)


def small_axes(extent: int) -> Iterator[Axis]:
    """Every axis of this length (dilations beyond 4 and windows beyond extent + 2 add nothing)."""
    for dilation, is_causal, boundary in product(
        range(1, 5), (False, True), ("shift", "mask", "zeros")
    ):
        largest = extent // dilation if boundary == "shift" else extent // dilation + 2
        for kernel_size in range(1, largest + 1):
            for stride in range(1, kernel_size + 1):
                offsets = {0, 1, stride // 2, -2} if stride > 1 else {0}
                for offset in offsets:
                    yield Axis(extent, kernel_size, stride, dilation, is_causal, boundary, offset)


def check_axis(axis: Axis) -> None:
    """Everything the core says about an axis, against the definition's lists of keys."""
    ints = axis.ints()
    attended = {token: definition(axis, token) for token in axis.query_box}

    windows = _C.windows(ints)
    assert len(windows) == len(axis.query_box)
    for token, (group, begin, end, counted) in zip(axis.query_box, windows, strict=True):
        keys, expected = attended[token]
        assert group == token % axis.dilation
        assert list(range(begin, end)) == keys, f"{axis}: window of token {token}"
        assert counted == expected, f"{axis}: keys counted for token {token}"

    assert _C.attended_pairs(ints) == sum(len(keys) for keys, _ in attended.values())
    seen = {
        key * axis.dilation + token % axis.dilation
        for token, (keys, _) in attended.items()
        for key in keys
    }
    assert _C.attended_tokens(ints) == ((min(seen), max(seen)) if seen else (0, -1)), f"{axis}"

    askers: dict[tuple[int, int], list[int]] = {}
    for token, (keys, _) in attended.items():
        for key in keys:
            askers.setdefault((token % axis.dilation, key), []).append(token // axis.dilation)
    inverse = _C.inverse_windows(ints)
    assert len(inverse) == len(axis.key_box)
    for token, (group, begin, end) in zip(axis.key_box, inverse, strict=True):
        assert group == token % axis.dilation
        place = (group, token // axis.dilation)
        assert list(range(begin, end)) == askers.get(place, []), f"{axis}: queries of key {token}"


def check_tiles(axis: Axis, query_tile: int, key_tile: int) -> None:
    """Boxes of query tiles, and the count of key tiles, against the lists of keys."""
    boxes = iter(_C.tile_boxes(axis.ints(), query_tile))
    visited = 0
    for group in range(min(axis.dilation, axis.extent)):
        tokens = [token for token in axis.query_box if token % axis.dilation == group]
        for first in range(0, len(tokens), query_tile):
            tile = tokens[first : first + query_tile]
            keys = [set(definition(axis, token)[0]) for token in tile]
            union, common = set.union(*keys), set.intersection(*keys)
            got, query, query_end, begin, end, interior, interior_end = next(boxes)
            assert (got, query, query_end) == (
                group,
                tile[0] // axis.dilation,
                tile[-1] // axis.dilation + 1,
            )
            assert (begin, end) == (min(union), max(union) + 1), f"{axis}: box of tile {tile}"
            assert set(range(interior, interior_end)) == common, f"{axis}: interior of tile {tile}"
            visited += len(range(begin, end, key_tile))
    assert next(boxes, None) is None
    assert _C.visited_tiles(axis.ints(), query_tile, key_tile) == visited


@pytest.mark.parametrize("extent", range(1, 19))
def test_every_small_axis(extent: int) -> None:
    for axis in small_axes(extent):
        check_axis(axis)


@pytest.mark.parametrize("extent", [1, 2, 5, 9, 14])
def test_tiles_of_small_axes(extent: int) -> None:
    random.seed(extent)
    axes = list(small_axes(extent))
    for axis in random.sample(axes, min(len(axes), 600)):
        check_tiles(axis, random.randint(1, 5), random.randint(1, 5))


@pytest.mark.parametrize("extent", [2, 5, 8, 11, 14])
def test_boxes_of_a_larger_grid(extent: int) -> None:
    random.seed(extent)
    axes = list(small_axes(extent))
    for axis in random.sample(axes, min(len(axes), 600)):
        begin = random.randrange(extent)
        some = replace(axis, queries=(begin, random.randint(begin + 1, extent)))
        needed = [
            key * axis.dilation + token % axis.dilation
            for token in some.query_box
            for key in definition(axis, token)[0]
        ]
        tight = replace(some, keys=(min(needed), max(needed) + 1))
        check_axis(tight)
        check_tiles(tight, random.randint(1, 5), random.randint(1, 5))
        if axis.kernel_size == extent:  # "all keys there are", however few
            continue
        for lacking in ((min(needed) + 1, max(needed) + 1), (min(needed), max(needed))):
            with pytest.raises(ValueError, match="pass more keys"):
                _C.windows(replace(some, keys=lacking).ints())


@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_attention_with_fewer_keys_than_queries(is_causal: bool) -> None:
    windows = _C.windows(Axis(8, 8, is_causal=is_causal, keys=(0, 3)).ints())
    ends = [min(i + 1, 3) if is_causal else 3 for i in range(8)]
    assert windows == [(0, 0, end, end) for end in ends]


def test_no_queries() -> None:
    axis = Axis(6, 3, queries=(2, 2))
    check_axis(axis)
    check_axis(replace(axis, keys=(4, 4)))
    check_tiles(axis, 4, 4)


def test_larger_axes() -> None:
    random.seed(0)
    for _ in range(60):
        boundary = random.choice(("shift", "mask", "zeros"))
        dilation, kernel_size = random.randint(1, 9), random.randint(1, 40)
        extent = random.randint(kernel_size * dilation, 400)
        stride, offset = random.randint(1, kernel_size), random.randint(-50, 50)
        axis = Axis(extent, kernel_size, stride, dilation, random.random() < 0.4, boundary, offset)
        check_axis(axis)
        check_tiles(axis, random.randint(1, 64), random.randint(1, 64))


@pytest.mark.parametrize("extent", range(1, 15))
def test_valid_queries(extent: int) -> None:
    for kernel_size, dilation in product(range(1, extent + 2), range(1, 5)):
        axis = Axis(extent, kernel_size, dilation=dilation, boundary="valid")
        mask = replace(axis, boundary="mask")
        whole = [t for t in range(extent) if len(definition(mask, t)[0]) == kernel_size]
        begin, end = _C.valid_queries(axis.ints())
        assert list(range(begin, end)) == whole
        assert len(whole) == max(0, extent - (kernel_size - 1) * dilation)
        check_axis(replace(axis, queries=(begin, end)))


def attended(axis: Axis) -> list[set[int]]:
    """Keys of every token of an undilated axis."""
    return [set(range(begin, end)) for _, begin, end, _ in _C.windows(axis.ints())]


@pytest.mark.parametrize("extent", [1, 4, 7])
def test_whole_window_is_attention(extent: int) -> None:
    everything = set(range(extent))
    for stride in range(1, extent + 1):
        assert attended(Axis(extent, extent, stride)) == [everything] * extent
    assert attended(Axis(extent, extent, is_causal=True)) == [
        set(range(i + 1)) for i in range(extent)
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_blocked_attention(size: int) -> None:
    blocks = [set(range(i // size * size, (i // size + 1) * size)) for i in range(4 * size)]
    assert attended(Axis(4 * size, size, stride=size)) == blocks


@pytest.mark.parametrize(("block", "halo"), [(4, 1), (4, 3), (3, 2)])
def test_halonet(block: int, halo: int) -> None:
    extent = 4 * block
    expected = [
        {
            key
            for key in range(extent)
            if i // block * block - halo <= key < (i // block + 1) * block + halo
        }
        for i in range(extent)
    ]
    assert attended(Axis(extent, block + 2 * halo, stride=block, boundary="mask")) == expected


@pytest.mark.parametrize(("size", "shift"), [(4, 2), (4, 1), (3, 1)])
def test_shifted_windows(size: int, shift: int) -> None:
    extent = 4 * size
    expected = [
        {key for key in range(extent) if (key - shift) // size == (i - shift) // size}
        for i in range(extent)
    ]
    axis = Axis(extent, size, stride=size, boundary="mask", offset=shift)
    assert attended(axis) == expected


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (Axis(8, 0), r"kernel_size\[0\] = 0 must be at least 1"),
        (Axis(8, 3, stride=4), r"stride\[0\] = 4 must lie between 1 and kernel_size\[0\] = 3"),
        (Axis(8, 3, stride=0), r"stride\[0\] = 0"),
        (Axis(8, 3, dilation=0), r"dilation\[0\] = 0 must be at least 1"),
        (Axis(8, 9), r"kernel_size\[0\] = 9 times dilation\[0\] = 1 exceeds extent\[0\] = 8"),
        (Axis(8, 3, dilation=3), r"kernel_size\[0\] = 3 times dilation\[0\] = 3 exceeds"),
        (Axis(8, 3, stride=2, boundary="valid"), "'valid' on axis 0 wants stride 1"),
        (Axis(8, 3, is_causal=True, boundary="valid"), "'valid' on axis 0 wants stride 1"),
        (Axis(8, 3, queries=(4, 9)), r"query_origin\[0\] = 4 .* leave the grid"),
        (Axis(8, 3, keys=(-1, 8)), r"key_origin\[0\] = -1 .* leave the grid"),
        (Axis(8, 3, keys=(0, 6)), r"axis 0 .* reach from token 0 to token 7 .* tokens 0 to 5"),
        (Axis(2**30, 3), r"extent\[0\] = 1073741824 exceeds 2\^29"),
        (Axis(8, 3, stride=2, offset=2**30), r"offset\[0\] = 1073741824 is beyond 2\^29"),
        (Axis(8, 2**16, dilation=2**16, boundary="mask"), r"dilation\[0\] = 65536 exceeds 2\^29"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused(axis: Axis, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.windows(axis.ints())


def test_refused_ints() -> None:
    with pytest.raises(ValueError, match="11 integers"):
        _C.windows([8, 3])
    with pytest.raises(ValueError, match="boundary = 4"):
        _C.windows([8, 3, 1, 1, 0, 4, 0, 0, 8, 0, 8])
    with pytest.raises(ValueError, match="key_tile = 0"):
        _C.visited_tiles(Axis(8, 3).ints(), 4, 0)
