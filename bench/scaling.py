# SPDX-License-Identifier: MIT
"""What a token costs in pictures of every size: where memory is fresh, or caches are left, it costs more than it needs to.

All sizes take turns in one process, as its allocator finds them; nothing is set for it, unlike in the other measurements.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import unfused
from bench.cases import Case
from bench.measure import FORWARD, FORWARD_BACKWARD, Effort, Turns
from bench.methods import OURS, Problem, build
from bench.report import cell

UNFUSED = "unfused"
CALLS = (FORWARD, FORWARD_BACKWARD, UNFUSED)
SIDES = (32, 64, 128, 256, 512, 1024)
WINDOWS = (3, 7, 13)
BASE = 64  # the side that larger ones are compared with: smaller pictures are bound by what a call costs


def problem_of(side: int, window: int) -> Problem:
    return Problem(Case(f"2d-{side}-k{window}", (side, side), (window, window)), "fp32", 64)


def bytes_of(problem: Problem, call: str) -> int:
    """Memory that a call takes, with its operands."""
    case = problem.case
    rows = 4 * case.batch * case.heads * case.tokens
    if call == UNFUSED:
        return rows * (6 * problem.head_dim + 2 * case.pairs // case.tokens)
    return rows * problem.head_dim * (4 if call == FORWARD else 7)


def page_faults() -> int:
    """Of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def available_bytes() -> int:
    """Memory that the system can give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


class Counted:
    """A call that counts page faults.

    Attributes:
        per_call: Page faults of each call.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.per_call: list[int] = []

    def __call__(self) -> None:
        before = page_faults()
        self._run()
        self.per_call.append(page_faults() - before)


@dataclass(frozen=True)
class Row:
    """A window and a call.

    Attributes:
        window: Tokens on each axis.
        call: What is measured.
        ns: By side of the picture, nanoseconds a token and head in the fastest round; sides that memory is too small for
            are not there.
        faults: Likewise the mean of page faults a call.
    """

    window: int
    call: str
    ns: dict[int, float] = field(default_factory=dict)
    faults: dict[int, float] = field(default_factory=dict)

    @property
    def growth(self) -> float | None:
        """How many times more a token costs in the dearest of pictures larger than the base."""
        larger = [ns for side, ns in self.ns.items() if side >= BASE]
        return max(larger) / self.ns[BASE] if BASE in self.ns else None


def runner(problem: Problem, call: str) -> Callable[[], object]:
    if call != UNFUSED:
        attention = build(OURS, problem, backward=call == FORWARD_BACKWARD)
        if call == FORWARD:
            return attention.forward()
        leaves = [t.requires_grad_() for t in attention.operands]
        d_output = leaves[0].detach()
        return lambda: torch.autograd.grad(attention.attend(*leaves), leaves, d_output)
    pair = unfused.ours(problem)
    query, key, value = (t.movedim(-2, 1).contiguous() for t in problem.operands())

    return lambda: pair.av(pair.qk(query, key).softmax(-1), value)


def measure(window: int, call: str, sides: Sequence[int], effort: Effort) -> Row:
    """One row; all sides of a picture take turns."""
    row = Row(window, call)
    available = available_bytes()
    turns: dict[int, tuple[Turns, Counted]] = {}
    for side in sorted(sides):
        problem = problem_of(side, window)
        if bytes_of(problem, call) > 0.8 * available:
            continue
        available -= bytes_of(problem, call)
        counted = Counted(runner(problem, call))
        turns[side] = Turns(counted), counted
    for turn, counted in turns.values():
        turn.burst(effort)  # until the allocator has found its ways
        turn.bursts.clear()
        counted.per_call.clear()
    for _ in range(effort.rounds):
        for turn, _ in turns.values():
            turn.burst(effort)
    for side, (turn, counted) in turns.items():
        case = problem_of(side, window).case
        fastest = min(burst for burst in turn.bursts if burst is not None)
        row.ns[side] = fastest / (case.tokens * case.heads) * 1e9
        row.faults[side] = sum(counted.per_call) / len(counted.per_call)
    return row


def header(sides: Sequence[int]) -> list[str]:
    return ["window", "call", *(f"{side}x{side}" for side in sides), "growth"]


def cells(rows: Sequence[Row], sides: Sequence[int]) -> list[list[str]]:
    """A line per row: nanoseconds, and in parentheses page faults."""
    return [
        [
            f"{row.window}x{row.window}",
            row.call,
            *(f"{cell(row.ns.get(n), 0)} ({cell(row.faults.get(n), 0)})" for n in sides),
            cell(row.growth, 2),
        ]
        for row in rows
    ]


def plot(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Nanoseconds over the size of the picture, one panel per call."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    calls = list(dict.fromkeys(row.call for row in rows))
    figure, axes = pyplot.subplots(1, len(calls), figsize=(4 * len(calls), 3.6), squeeze=False)
    for axis, call in zip(axes[0], calls, strict=True):
        for row in (row for row in rows if row.call == call):
            sides = [str(side) for side in row.ns]
            axis.plot(sides, list(row.ns.values()), "o-", label=f"{row.window} x {row.window}")
        axis.set_ylim(bottom=0)
        axis.set_title(call, fontsize=10)
        axis.set_xlabel("side of the picture, tokens")
    axes[0, 0].set_ylabel("ns a token and head")
    axes[0, 0].legend(title="window", fontsize=8)
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
