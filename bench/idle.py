# SPDX-License-Identifier: MIT
"""Our calls in moments when the machine does nothing else: idle before the call ahead of each, before it, and after it.

On a machine that others share, also unseen (a virtual machine's CPU may be one of two hardware threads of a core), a median
over all calls tells more of them than of the kernels. Probes count additions of integers, which take turns with whatever
else the core does; calls go on as long as probes find the machine idle. What others do between two probes, or to shared caches
and memory, goes unnoticed, so that figures may be too low.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from bench.measure import FORWARD, FORWARD_BACKWARD, runner, settle_malloc, wall_clock
from bench.methods import OURS, Problem, build
from bench.peak import integer_additions, peak_flops
from bench.report import cell

# Of the most additions a second that any probe found. Beside another hardware thread, a core of a Zen 4 did 40 to 85 % of them,
# by hand.
IDLE = 0.95
# Of a turn: each problem and direction gets one after the other, and waits in it for the machine to be idle.
TURN_SECONDS = 0.05


class Probe:
    """Knows the most additions a second that the machine has done so far."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.most = 0.0

    def additions(self) -> float:
        found = integer_additions(self.threads)
        self.most = max(self.most, found)
        return found

    def is_idle(self, additions: float) -> bool:
        return additions >= IDLE * self.most


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        seconds: Its time.
        peak: FLOP/s of the machine, right after it.
        additions: A second, the fewest of all three probes.
    """

    seconds: float
    peak: float
    additions: float


@dataclass
class Row:
    """The result for one problem in one direction."""

    problem: Problem
    direction: str
    calls: list[Call] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Useful: of attended pairs."""
        backward = self.direction == FORWARD_BACKWARD
        return self.problem.case.flops(self.problem.head_dim, backward=backward)

    def idle(self, probe: Probe) -> list[Call]:
        """The calls that all probes found the machine idle for."""
        return [call for call in self.calls if probe.is_idle(call.additions)]

    def seconds(self, probe: Probe) -> list[float]:
        """Of those."""
        return [call.seconds for call in self.idle(probe)]

    def take_turn(self, run: Callable[[], object], probe: Probe) -> None:
        """Waits until the machine is idle, and calls until it no longer is."""
        end = time.perf_counter() + TURN_SECONDS
        probes = [probe.additions()]
        while not probe.is_idle(probes[-1]):
            if time.perf_counter() >= end:
                return
            probes = [probe.additions()]
        while probe.is_idle(probes[-1]):
            seconds = wall_clock(run)
            peak = peak_flops(self.problem.dtype, probe.threads, seconds=2e-4)
            probes.append(probe.additions())
            if len(probes) == 2:  # warms the caches, after another problem's turn
                continue
            self.calls.append(Call(seconds, peak, min(probes[-3:])))
            if time.perf_counter() >= end:
                return


def measure(
    problems: Sequence[Problem], directions: tuple[str, ...], probe: Probe, seconds: float
) -> list[Row]:
    """One row per problem and direction, which take turns for some seconds altogether."""
    settle_malloc()
    rows = []
    for problem in problems:
        ours = build(OURS, problem)
        rows += [(Row(problem, direction), runner(ours, direction)) for direction in directions]
    order = random.Random(0)
    begin = now = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", leave=False) as bar:
        while now < begin + seconds:
            # Else others who work once a second, say, may always meet the same rows.
            for row, run in order.sample(rows, len(rows)):
                row.take_turn(run, probe)
            now = time.perf_counter()
            bar.update(min(int(now - begin), bar.total) - bar.n)
    return [row for row, _ in rows]


HEADER = (
    *("problem", "dtype", "head dim", "direction", "calls", "us", "GFLOP/s", "% of peak"),
    *("fastest tenth", "fwd+bwd / fwd"),
)


def cells(rows: Sequence[Row], probe: Probe) -> list[list[str]]:
    """A line per row: medians of idle calls, but for the fastest tenth of them."""
    forward = {row.problem: row for row in rows if row.direction == FORWARD}
    lines = []
    for row in rows:
        problem, seconds = row.problem, sorted(row.seconds(probe))
        name = (problem.case.name, problem.dtype, str(problem.head_dim), row.direction)
        if not seconds:
            lines.append([*name, "0", *("-" for _ in HEADER[5:])])
            continue
        usual, fast = statistics.median(seconds), seconds[len(seconds) // 10]
        peak = statistics.median(call.peak for call in row.idle(probe))
        base = forward[problem].seconds(probe) if problem in forward else []
        is_ratio = base and row.direction == FORWARD_BACKWARD
        lines.append(
            [
                *(*name, str(len(seconds)), cell(usual, 0, 1e6), cell(row.flops / usual, 1, 1e-9)),
                cell(row.flops / usual / peak, 1, 100),
                cell(row.flops / fast / peak, 1, 100),
                cell(usual / statistics.median(base) if is_ratio else None, 2),
            ]
        )
    return lines


def missing(rows: Sequence[Row], probe: Probe) -> list[str]:
    """What has no figures, and what to do."""
    return [
        f"{row.problem.case.name} {row.problem.dtype} {row.direction}: no idle moment was long enough; "
        "wait for more of them (--seconds), on fewer threads (--threads)"
        for row in rows
        if not row.idle(probe)
    ]
