# SPDX-License-Identifier: MIT
"""The unfused ops one by one: what bounds each of them, and what it takes beside gathered windows and fused attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import FORWARD, FORWARD_BACKWARD, Effort, Turns, median, ratio, settle_malloc
from bench.methods import DTYPES, OURS, Problem, UnavailableError, build, check, gatherer
from bench.peak import peak_flops
from bench.report import cell
from natten import functional

GATHER, FUSED = "gather", "fused"
METHODS = (OURS, GATHER, FUSED)
# Each an op of the core, but for softmax, which is torch's; then what users call.
OPS = ("qk", "softmax", "av", "av_transposed", "rpb_gradient", FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Work:
    """What an op cannot do without.

    Attributes:
        flops: Of attended pairs.
        moved: Bytes of its operands and results, each read or written once.
    """

    flops: float
    moved: float


def work_of(op: str, problem: Problem) -> list[Work]:
    """The parts of an op, one after the other: each reads from memory what the one before it wrote."""
    case = problem.case
    heads = case.batch * case.heads
    item = DTYPES[problem.dtype].itemsize
    weights = float(heads * case.pairs * item)
    product = Work(
        2.0 * heads * case.pairs * problem.head_dim,
        weights + 2 * heads * case.tokens * problem.head_dim * item,
    )
    softmax, d_softmax = Work(0, 2 * weights), Work(0, 3 * weights)
    forward = [product, softmax, product]
    return {
        "softmax": [softmax],
        "rpb_gradient": [Work(0, weights)],
        FORWARD: forward,
        FORWARD_BACKWARD: [*forward, product, product, d_softmax, product, product],
    }.get(op, [product])


@dataclass
class Row:
    """The result for one op on one problem."""

    case: str
    dtype: str
    head_dim: int
    op: str
    work: list[Work]
    # By round: FLOP/s, bytes/s, and the median seconds of each method's turn; None where it took none.
    peaks: list[float]
    bandwidths: list[float | None]
    bursts: dict[str, list[float | None]]

    @property
    def seconds(self) -> dict[str, float]:
        """By method."""
        return {method: median(bursts) for method, bursts in self.bursts.items()}

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.work)

    @property
    def moved(self) -> float:
        return sum(part.moved for part in self.work)

    @property
    def share_of_roofline(self) -> float | None:
        """The seconds that the machine needs at least, in those that we take."""
        bounds = [
            self._bound(peak, bandwidth) if bandwidth else None
            for peak, bandwidth in zip(self.peaks, self.bandwidths, strict=True)
        ]
        return ratio(bounds, self.bursts[OURS])

    def times(self, method: str) -> float | None:
        """How many times faster than another method."""
        return ratio(self.bursts[method], self.bursts[OURS]) if method in self.bursts else None

    def _bound(self, peak: float, bandwidth: float) -> float:
        """For each part, the seconds of its arithmetic or of its memory."""
        return sum(max(part.flops / peak, part.moved / bandwidth) for part in self.work)


@dataclass(frozen=True)
class Products:
    """The two products of attention by one method, on `[batch, heads, *grid, ...]`."""

    qk: Callable[..., Tensor]  # (query, key), and rpb=… of ours
    av: Callable[[Tensor, Tensor], Tensor]


def ours(problem: Problem) -> Products:
    rank, kernel_size = len(problem.case.grid), problem.case.kernel_size
    qk = (functional.na1d_qk, functional.na2d_qk, functional.na3d_qk)[rank - 1]
    av = (functional.na1d_av, functional.na2d_av, functional.na3d_av)[rank - 1]
    return Products(
        lambda query, key, rpb=None: qk(query, key, kernel_size, rpb=rpb),
        lambda weights, value: av(weights, value, kernel_size),
    )


def gathering(problem: Problem) -> Products:
    gathered = gatherer(problem, backward=True)

    def products(rows: Tensor, windows: Tensor) -> Tensor:
        product = rows.flatten(2, -2)[..., None, :] @ windows
        return product.reshape(*rows.shape[:-1], -1)

    def qk(query: Tensor, key: Tensor) -> Tensor:
        return products(query, gathered(key.flatten(2, -2)).mT)

    def av(weights: Tensor, value: Tensor) -> Tensor:
        return products(weights, gathered(value.flatten(2, -2)))

    return Products(qk, av)


def runs(pair: Products, problem: Problem, *, has_rpb: bool) -> dict[str, Callable[[], Any]]:
    """Every op as a call, of the same operands for all methods."""
    query, key, value = (t.movedim(-2, 1).contiguous() for t in problem.operands())
    query = query * problem.head_dim**-0.5
    logits = pair.qk(query, key)
    weights = logits.softmax(-1)
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    d_output = torch.ones_like(value)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return pair.av(pair.qk(query, key).softmax(-1), value)

    # The gradient of a graph that is kept is a call of one op.
    output = pair.av(weights, leaves[2])
    ops: dict[str, Callable[[], Any]] = {
        "qk": lambda: pair.qk(query, key),
        "softmax": lambda: logits.softmax(-1),
        "av": lambda: pair.av(weights, value),
        "av_transposed": lambda: torch.autograd.grad(
            output, leaves[2], d_output, retain_graph=True
        ),
        FORWARD: lambda: attend(query, key, value),
        FORWARD_BACKWARD: lambda: torch.autograd.grad(attend(*leaves), leaves, d_output),
    }
    if has_rpb:
        entries = (2 * size - 1 for size in problem.case.kernel_size)
        rpb = torch.zeros(problem.case.heads, *entries, requires_grad=True)
        biased = pair.qk(query, key, rpb=rpb)
        ops["rpb_gradient"] = lambda: torch.autograd.grad(biased, rpb, weights, retain_graph=True)
    return ops


def _copier(problem: Problem) -> tuple[Callable[[], object], float]:
    """A copy of a tensor as large as the weights, so that it meets the same caches as they do, and its bytes."""
    case = problem.case
    source = torch.ones(case.batch * case.heads * case.pairs, dtype=DTYPES[problem.dtype])
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def heads_last(output: Tensor) -> Tensor:
    """`[batch, heads, *grid, head_dim]` as `[batch, tokens, heads, head_dim]`."""
    return output.flatten(2, -2).transpose(1, 2)


def _gathers(problem: Problem, expected: Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    """The same calls with gathered windows, but softmax; none if these take too much memory."""
    try:
        gathered = runs(gathering(problem), problem, has_rpb=False)
    except UnavailableError:
        return {}
    check(problem, expected, GATHER, heads_last(gathered[FORWARD]()))
    return {(GATHER, op): call for op, call in gathered.items() if op != "softmax"}


def measure(problem: Problem, effort: Effort, *, gathers: bool) -> list[Row]:
    """One row per op; peak and bandwidth are measured in turns with the ops."""
    threads = torch.get_num_threads()
    settle_malloc()
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    unfused = runs(ours(problem), problem, has_rpb=True)
    calls |= {(OURS, op): unfused[op] for op in OPS}
    fused = build(OURS, problem)
    calls[FUSED, FORWARD] = fused.forward()
    calls[FUSED, FORWARD_BACKWARD] = fused.forward_backward()
    expected = fused.heads_last(fused.forward()())
    check(problem, expected, "unfused", heads_last(unfused[FORWARD]()))
    if gathers:
        calls |= _gathers(problem, expected)
    copy, copied = _copier(problem)
    turns = {key: Turns(call) for key, call in calls.items()}
    copies = Turns(copy)
    peaks = []
    for _ in range(effort.rounds):
        for turn in turns.values():
            turn.burst(effort)
        copies.burst(effort)
        peaks.append(peak_flops(problem.dtype, threads))
    bandwidths = [copied / burst if burst else None for burst in copies.bursts]
    return [
        Row(
            *(problem.case.name, problem.dtype, problem.head_dim, op),
            *(work_of(op, problem), peaks, bandwidths),
            {method: turns[method, op].bursts for method in METHODS if (method, op) in turns},
        )
        for op in OPS
    ]


HEADER = (
    *("problem", "dtype", "head dim", "op", "us", "GFLOP/s", "GB/s", "% of roofline"),
    *("gather, us", "x gather", "fused, us", "x fused"),
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line per row; the bound is the roofline of the machine's peak and the bandwidth of a copy."""
    return [
        [
            *(row.case, row.dtype, str(row.head_dim), row.op),
            cell(row.seconds[OURS], 0, 1e6),
            cell(row.flops / row.seconds[OURS], 1, 1e-9),
            cell(row.moved / row.seconds[OURS], 1, 1e-9),
            cell(row.share_of_roofline, 1, 100),
            cell(row.seconds.get(GATHER), 0, 1e6),
            cell(row.times(GATHER), 1),
            cell(row.seconds.get(FUSED), 0, 1e6),
            cell(row.times(FUSED), 2),
        ]
        for row in rows
    ]
