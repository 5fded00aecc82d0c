# SPDX-License-Identifier: MIT
"""The unfused kernels, every row of the table, against a dense computation in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from natten import _C
from tests.cases import FEATURES, PAIRS, Problem, random_problem

pytestmark = pytest.mark.cpu  # calls the core with addresses of the CPU

OPS = ("qk", "av", "av_transposed", "rpb_gradient")
ROWS = [kernel for kernel in _C.kernels() if kernel.op in OPS]
BASELINE = "baseline"
# What surrounds tensors in memory, and must still be there afterwards.
GUARD = -77.0


def flat_axes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """The axes as the core wants them: the query tensor holds queries only."""
    axes = []
    for i, grid in enumerate(problem.grid):
        queries = problem._queries(i)
        settings = (problem.stride[i], problem.dilation[i], int(problem.is_causal[i]))
        boundary = _C.BOUNDARIES.index(problem.boundary[i])
        boxes = (queries.start, len(queries), *problem.key_box[i])
        axes.append((grid, problem.kernel_size[i], *settings, boundary, problem.offset[i], *boxes))
    return tuple(axes)


@dataclass(frozen=True)
class Pairs:
    """Which query attends to which key, densely; queries and keys of the grid are numbered row by row."""

    attended: torch.Tensor  # [queries, keys]
    slot: torch.Tensor  # [queries, keys]: of the key in the query's weights
    bias: torch.Tensor  # [queries, keys]: entry of the flat bias table
    counted: (
        torch.Tensor
    )  # [queries, slots]: slots that hold a key, or a missing one that counts as a key


def pairs_of(axes: tuple[tuple[int, ...], ...]) -> Pairs:
    attended = torch.ones(1, 1, dtype=torch.bool)
    slot = torch.zeros(1, 1, dtype=torch.long)
    bias = torch.zeros(1, 1, dtype=torch.long)
    counted = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        kernel_size, dilation = axis[1], axis[3]
        query = torch.arange(axis[7], axis[7] + axis[8])[:, None]
        key = torch.arange(axis[9], axis[9] + axis[10])[None, :]
        _, begin, end, count = torch.tensor(_C.windows(axis), dtype=torch.long).reshape(-1, 4).T
        position = key // dilation
        there = (key % dilation == query % dilation) & (position >= begin[:, None])
        there &= position < end[:, None]
        of_axis = Pairs(
            there,
            (position - begin[:, None]).clamp(0, kernel_size - 1),
            (position - query // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2),
            torch.arange(kernel_size)[None, :] < count[:, None],
        )
        attended = _outer(attended, of_axis.attended, torch.logical_and)
        slot = _outer(slot * kernel_size, of_axis.slot, torch.add)
        bias = _outer(bias * (2 * kernel_size - 1), of_axis.bias, torch.add)
        counted = _outer(counted, of_axis.counted, torch.logical_and)
    return Pairs(attended, slot, bias, counted)


def _outer(left, right, join):
    return join(left[:, None, :, None], right[None, :, None, :]).flatten(0, 1).flatten(1, 2)


class Call:
    """Random tensors of a problem, what each op makes of them, and what is right.

    Tokens are [batch, heads, *grid, head_dim], weights [batch, heads, *grid, slots], rpb [heads, entries].
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, seed: int) -> None:
        self.problem, self.dtype = problem, dtype
        self.axes = flat_axes(problem)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.queries = tuple(axis[8] for axis in self.axes)
        self.keys = tuple(axis[10] for axis in self.axes)
        self.table = math.prod(2 * axis[1] - 1 for axis in self.axes)
        self.slots = math.prod(problem.kernel_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.pairs = pairs_of(self.axes)

        batch, heads = problem.batch, problem.heads
        self.query = self.tensor(batch, heads, *self.queries, problem.head_dim)
        self.key = self.tensor(batch, problem.heads_kv, *self.keys, problem.head_dim)
        self.weights = self.tensor(batch, heads, *self.queries, self.slots)
        self.rpb = torch.randn(heads, self.table, generator=self.generator, dtype=self.wide)
        # What slots without a key hold is nobody's business.
        slots = self.pairs.slot.masked_fill(~self.pairs.attended, self.slots)
        filled = torch.zeros(len(slots), self.slots + 1, dtype=torch.bool).scatter_(1, slots, True)
        self.filled = filled[:, :-1].reshape(*self.queries, self.slots)
        self.weights.masked_fill_(~self.filled, math.nan)

    def tensor(self, *shape: int) -> torch.Tensor:
        return self.placed(
            torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        )

    def placed(self, numbers: torch.Tensor) -> torch.Tensor:
        """As a part of a larger tensor; of one with heads last, if the problem is strided."""
        if self.problem.strided:
            numbers = numbers.movedim(1, -2)
        shape = numbers.shape
        memory = torch.full((*shape[:-1], shape[-1] + 3), GUARD, dtype=self.dtype)
        view = memory[..., 1:-2]
        view.copy_(numbers)
        return view.movedim(-2, 1) if self.problem.strided else view

    def dense(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights in storage as a matrix [batch, heads, queries, keys] of float64."""
        flat = weights.double().flatten(2, -2)
        slot = self.pairs.slot.expand(*flat.shape[:2], -1, -1)
        return flat.gather(-1, slot).masked_fill(~self.pairs.attended, 0)

    def expected(self, op: str, unused: float, has_rpb: bool) -> torch.Tensor:
        group = self.problem.heads // self.problem.heads_kv
        query = self.query.double().flatten(2, -2)
        key = self.key.double().flatten(2, -2).repeat_interleave(group, dim=1)
        if op == "qk":
            logits = query @ key.mT
            if has_rpb:
                logits += self.rpb.double()[:, self.pairs.bias]
            row = torch.where(self.pairs.counted, 0.0, unused).double()
            row = torch.cat([row, torch.zeros(len(row), 1, dtype=torch.float64)], dim=1)
            stored = row.expand(*logits.shape[:2], -1, -1).clone()
            slot = self.pairs.slot.masked_fill(~self.pairs.attended, self.slots)
            stored.scatter_(-1, slot.expand_as(logits), logits)
            return stored[..., :-1].reshape(self.weights.shape)
        dense = self.dense(self.weights)
        if op == "av":
            return (dense @ key).reshape(self.query.shape)
        if op == "av_transposed":
            by_head = dense.mT @ query
            return by_head.unflatten(1, (-1, group)).sum(2).reshape(self.key.shape)
        table = torch.zeros_like(self.rpb, dtype=torch.float64)
        bias = self.pairs.bias[self.pairs.attended]
        return table.index_add_(1, bias, dense.sum(0)[:, self.pairs.attended])

    def run(
        self, kernel: str, op: str, unused: float, has_rpb: bool, num_threads: int
    ) -> torch.Tensor:
        """What the kernel makes of it; raises if it writes anything else."""
        problem = self.problem
        core = _C.Problem(
            str(self.dtype).removeprefix("torch."),
            [number for axis in self.axes for number in axis],
            *(problem.batch, problem.heads, problem.heads_kv, problem.head_dim, problem.head_dim),
            *(0, has_rpb, 1.0),
        )
        operands = {"query": self.query, "key": self.key, "weights": self.weights, "rpb": self.rpb}
        output = {"qk": "weights", "av": "query", "av_transposed": "key", "rpb_gradient": "rpb"}[op]
        result = operands[output]
        result = (
            torch.full_like(result, math.nan)
            if output == "rpb"
            else self.placed(torch.full_like(result, math.nan))
        )
        untouched = {name: tensor.clone() for name, tensor in operands.items()}
        tensors = {**operands, output: result}
        _C.unfused(
            core,
            op,
            kernel,
            *(reference(tensors[name]) for name in ("query", "key", "weights")),
            self.rpb.data_ptr() if has_rpb and op == "qk" else 0,
            result.data_ptr() if op == "rpb_gradient" else 0,
            unused,
            num_threads,
        )
        for name, before in untouched.items():
            torch.testing.assert_close(operands[name], before, rtol=0, atol=0, equal_nan=True)
        if output != "rpb" and result.numel():
            memory = result.new_empty(0).set_(result.untyped_storage())
            assert (memory == GUARD).sum() >= 3 * math.prod(result.shape[:-1])
        return result

    def check(self, kernel: str, op: str, num_threads: int = 1) -> None:
        has_rpb = self.problem.has_rpb and op == "qk"
        unused = -math.inf if self.problem.seed % 2 else 0.0
        result = self.run(kernel, op, unused, has_rpb, num_threads)
        expected = self.expected(op, unused, has_rpb)
        # Inputs are what they are: an error is that of sums in float32, and of rounding the result once.
        finite = expected[expected.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        relative = torch.finfo(result.dtype).eps
        absolute = size * {torch.float64: 1e-13}.get(self.dtype, 2e-6)
        torch.testing.assert_close(result.double(), expected, rtol=relative, atol=absolute)


def reference(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], int]:
    """[batch, heads, *grid, dim] as the core wants it."""
    batch, heads, *axes, _ = tensor.stride()
    return (tensor.data_ptr(), batch, tuple(axes), heads)


@functools.lru_cache(maxsize=4)
def call_of(problem: Problem, dtype: torch.dtype) -> Call:
    print(f"{problem}")  # noqa: T201  # shown if the test fails
    return Call(problem, dtype, problem.seed)


def dtype_of(row: _C.Kernel) -> torch.dtype:
    return getattr(torch, row.dtypes[0])


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> _C.Kernel:
    kernel: _C.Kernel = request.param
    if kernel.isa not in (BASELINE, *_C.cpu_isas()):
        pytest.skip(f"this CPU does not run {kernel.isa}")
    return kernel


def check(problem: Problem, row: _C.Kernel, num_threads: int = 1) -> None:
    call_of(problem, dtype_of(row)).check(row.name, row.op, num_threads)


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("additional", "scale")])
def test_feature(feature: str, row: _C.Kernel) -> None:
    check(random_problem((feature,), 0), row)


# A fifth of the pairs, not the same fifth for each row.
PAIRS_OF_ROWS = [
    pytest.param(pair, row, id=f"{'-'.join(pair)}-{row.name}")
    for i, pair in enumerate(PAIRS)
    for j, row in enumerate(ROWS)
    if i % 5 == j % 5
]


@pytest.mark.parametrize(("pair", "row"), PAIRS_OF_ROWS, indirect=["row"])
def test_pair_of_features(pair: tuple[str, str], row: _C.Kernel) -> None:
    check(random_problem(pair, 1), row)


@pytest.mark.parametrize("seed", range(6))
def test_anything_by_several_threads(seed: int, row: _C.Kernel) -> None:
    check(random_problem((), seed), row, num_threads=2 + seed % 2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_anything_large(rank: int, row: _C.Kernel) -> None:
    check(random_problem((f"rank{rank}",), 0, large=True), row)


@pytest.mark.parametrize("seed", range(3))
def test_same_bits_by_any_number_of_threads(seed: int, row: _C.Kernel) -> None:
    problem = random_problem(("rpb",), seed)
    one, *others = (
        call_of(problem, dtype_of(row)).run(row.name, row.op, -math.inf, row.op == "qk", threads)
        for threads in (1, 2, 5)
    )
    for other in others:
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "extents", [(0, (0, 5), (0, 5)), (1, (2, 0), (0, 5))], ids=["batch", "queries"]
)
def test_nothing_to_compute(extents, row: _C.Kernel) -> None:
    batch, queries, keys = extents
    problem = Problem(
        *((5,), (3,), (1,), (1,), (False,), ("shift",), (0,)), (queries,), (keys,), batch=batch
    )
    Call(problem, dtype_of(row), 0).check(row.name, row.op)


def some_rows(wanted: Callable[[_C.Kernel], bool]) -> pytest.MarkDecorator:
    rows = [row for row in ROWS if wanted(row)]
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name, indirect=True)


# With 512 channels, scratch memory holds 2048 tokens of the side that is streamed.
@some_rows(lambda row: row.backend == "gemm" and row.op != "rpb_gradient")
def test_streams_that_do_not_fit_are_cut(row: _C.Kernel) -> None:
    few, many = (700, 20), (0, 2200)
    boxes = (many, few) if row.op == "av_transposed" else (few, many)
    problem = Problem(
        *((2200,), (2200,), (1,), (1,), (False,), ("mask",), (0,)),
        *((box,) for box in boxes),
        heads=2,
        heads_kv=1,
        head_dim=512,
    )
    check(problem, row)


@some_rows(lambda row: row.op in ("av", "av_transposed"))
def test_infinities_reach_whom_they_concern(row: _C.Kernel) -> None:
    """A token that is infinite counts for those who attend to it, and 0 times it for nobody."""
    grid = (9, 40)
    whole = tuple((0, extent) for extent in grid)
    problem = Problem(
        *(grid, (3, 4), (1, 1), (1, 1), (False, False), ("shift", "mask"), (0, 0), whole, whole)
    )
    call = Call(problem, dtype_of(row), 0)
    tokens, attended = (
        (call.key, call.pairs.attended) if row.op == "av" else (call.query, call.pairs.attended.T)
    )

    def result() -> torch.Tensor:
        return call.run(row.name, row.op, 0.0, has_rpb=False, num_threads=1).flatten(2, -2)

    finite = result()
    number = attended.shape[1] // 2
    tokens.flatten(2, -2)[:, :, number] = math.inf
    concerned = attended[:, number]
    assert 0 < concerned.sum() < len(concerned)
    found = result()
    assert not found[:, :, concerned].isfinite().any()
    torch.testing.assert_close(found[:, :, ~concerned], finite[:, :, ~concerned])
