# SPDX-License-Identifier: MIT
"""Our calls in moments when the machine does nothing else: each between two probes, which must find it idle.

On a machine that others share, also unseen (a virtual machine's CPU may be one of two hardware threads of a core), a median
over all calls tells more of them than of the kernels. Probes count additions of integers, which take turns with whatever
else the core does. Others at work between two probes go unnoticed: the longer a call, the more of its time may be theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.measure import FORWARD, FORWARD_BACKWARD, settle_malloc, wall_clock
from bench.methods import OURS, Problem, build
from bench.peak import integer_additions, peak_flops
from bench.report import cell

# Of the most additions a second that any probe found; beside others, a core has been seen to do 40 to 85 %.
IDLE = 0.95


@dataclass(frozen=True)
class Patience:
    """How long idle moments are waited for.

    Attributes:
        calls: Idle calls that are enough.
        seconds: Time for a problem in one direction, whether there were enough or not.
        burst: Seconds of a direction's turn.
    """

    calls: int = 100
    seconds: float = 20.0
    burst: float = 0.03


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        seconds: Its time.
        peak: FLOP/s of the machine, right after it.
        additions: A second, before it or after the peak, whichever were fewer.
    """

    seconds: float
    peak: float
    additions: float


@dataclass
class Row:
    """The result for one problem in one direction."""

    case: str
    dtype: str
    head_dim: int
    direction: str
    flops: float  # useful: of attended pairs
    calls: list[Call] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.case, self.dtype, self.head_dim

    def idle(self, most: float) -> list[Call]:
        """Calls between idle probes, if an idle machine does `most` additions a second."""
        return [call for call in self.calls if call.additions >= IDLE * most]

    def share_of_peak(self, calls: Sequence[Call]) -> float | None:
        """The median of those of the calls."""
        shares = [self.flops / call.seconds / call.peak for call in calls]
        return statistics.median(shares) if shares else None


def seconds_of(calls: Sequence[Call]) -> float | None:
    """The median."""
    return statistics.median(call.seconds for call in calls) if calls else None


class Probe:
    """Knows the most additions a second that the machine has done so far."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.most = 0.0

    def additions(self) -> float:
        found = integer_additions(self._threads)
        self.most = max(self.most, found)
        return found

    def time(self, run: Callable[[], object], dtype: str) -> Call:
        before = self.additions()
        seconds = wall_clock(run)
        peak = peak_flops(dtype, self._threads, seconds=2e-4)
        return Call(seconds, peak, min(before, self.additions()))


def measure(
    problem: Problem, directions: tuple[str, ...], patience: Patience, probe: Probe
) -> list[Row]:
    """One row per direction."""
    settle_malloc()
    ours = build(OURS, problem)
    runs = {FORWARD: ours.forward(), FORWARD_BACKWARD: ours.forward_backward()}
    rows = [
        Row(
            *(problem.case.name, problem.dtype, problem.head_dim, direction),
            problem.case.flops(problem.head_dim, backward=direction == FORWARD_BACKWARD),
        )
        for direction in directions
    ]
    end = time.perf_counter() + patience.seconds * len(rows)
    waiting = rows
    while waiting:
        for row in waiting:
            run = runs[row.direction]
            run()  # warms the caches again after the other direction's turn
            turn = time.perf_counter() + patience.burst
            row.calls.append(probe.time(run, row.dtype))
            while time.perf_counter() < turn:
                row.calls.append(probe.time(run, row.dtype))
        if time.perf_counter() >= end:
            break
        waiting = [row for row in rows if len(row.idle(probe.most)) < patience.calls]
    return rows


HEADER = (
    *("problem", "dtype", "head dim", "direction", "calls", "idle", "us", "GFLOP/s", "% of peak"),
    *("all calls, % of peak", "fwd+bwd / fwd"),
)


def cells(rows: Sequence[Row], most: float) -> list[list[str]]:
    """A line per row, of a machine that does `most` additions a second when it is idle."""
    forward = {row.key: row for row in rows if row.direction == FORWARD}
    lines = []
    for row in rows:
        calls = row.idle(most)
        seconds = seconds_of(calls)
        base = forward.get(row.key) if row.direction == FORWARD_BACKWARD else None
        forward_seconds = seconds_of(base.idle(most)) if base else None
        lines.append(
            [
                *(row.case, row.dtype, str(row.head_dim), row.direction),
                *(str(len(row.calls)), str(len(calls))),
                cell(seconds, 0, 1e6),
                cell(seconds and row.flops / seconds, 1, 1e-9),
                cell(row.share_of_peak(calls), 1, 100),
                cell(row.share_of_peak(row.calls), 1, 100),
                cell(seconds and forward_seconds and seconds / forward_seconds, 2),
            ]
        )
    return lines
