# SPDX-License-Identifier: MIT
"""Times all methods and the machine's peak in turns, so that noise on the machine meets all of them alike.

Ratios are medians over rounds of what was measured in the same round, as a machine's speed changes from second to second.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench import gpu
from bench.methods import (
    ALTERNATIVES,
    DENSE,
    OURS,
    Attention,
    Problem,
    UnavailableError,
    build,
    check,
)
from bench.peak import peak_flops

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: Turns; in each, every method runs for a burst.
        burst: Seconds of a method's turn; at least one call.
        budget: Seconds after which a method takes no more turns, once it has had three.
    """

    rounds: int = 12
    burst: float = 0.03
    budget: float = 2.0


QUICK = Effort(rounds=3, burst=0.01, budget=0.0)


@dataclass
class Row:
    """The result for one problem in one direction."""

    case: str
    dtype: str
    head_dim: int
    direction: str
    threads: int
    flops: float  # useful: of attended pairs
    # By round: FLOP/s, and the median seconds of each method's turn; None where it took none.
    peaks: list[float]
    bursts: dict[str, list[float | None]]
    missing: dict[str, str] = field(default_factory=dict)  # by method, why it has no time

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.case, self.dtype, self.head_dim, self.direction

    @property
    def seconds(self) -> dict[str, float]:
        """By method."""
        return {method: median(bursts) for method, bursts in self.bursts.items()}

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds[OURS] / 1e9

    @property
    def share_of_peak(self) -> float | None:
        return self.share_of(OURS)

    def share_of(self, method: str) -> float | None:
        """A method's useful FLOPs a second in those the machine can do."""
        at_peak = [self.flops / peak for peak in self.peaks]
        return ratio(at_peak, self.bursts[method]) if method in self.bursts else None

    @property
    def times_best(self) -> float | None:
        """How many times faster than the fastest alternative."""
        seconds = self.seconds
        others = [method for method in ALTERNATIVES if method in seconds]
        return self._times(min(others, key=seconds.__getitem__)) if others else None

    @property
    def times_dense(self) -> float | None:
        """How many times faster than attention of all tokens to all."""
        return self._times(DENSE) if DENSE in self.bursts else None

    def in_times_of(self, other: Row) -> float | None:
        """How many times longer than another row, measured in the same rounds."""
        return ratio(self.bursts[OURS], other.bursts[OURS])

    def _times(self, method: str) -> float | None:
        return ratio(self.bursts[method], self.bursts[OURS])


def median(bursts: Sequence[float | None]) -> float:
    """Over the rounds in which a method took a turn."""
    return statistics.median(burst for burst in bursts if burst is not None)


def ratio(of: Sequence[float | None], to: Sequence[float | None]) -> float | None:
    """The median over the rounds in which both were measured."""
    ratios = [a / b for a, b in zip(of, to, strict=True) if a is not None and b is not None]
    return statistics.median(ratios) if ratios else None


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds that a call takes on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Turns:
    """A method's calls and their times."""

    def __init__(
        self,
        run: Callable[[], object],
        clock: Callable[[Callable[[], object]], float] = wall_clock,
    ) -> None:
        self._run = run
        self._clock = clock
        self.bursts: list[float | None] = []
        self._spent = 0.0
        self._timed_call()  # compiles, and faults pages in

    def _timed_call(self) -> float:
        return self._clock(self._run)

    def burst(self, effort: Effort) -> None:
        if len(self.bursts) >= 3 and self._spent > effort.budget:
            self.bursts.append(None)
            return
        spent = self._timed_call()  # warms the caches again after another method's turn
        times = [] if spent < effort.burst else [spent]
        while spent < effort.burst:
            times.append(self._timed_call())
            spent += times[-1]
        self._spent += sum(times)
        self.bursts.append(statistics.median(times))


def settle_malloc() -> None:
    """Lets glibc keep what is freed, large tensors too, as caching allocators do.

    Else it returns the outputs of a call to the system, and all methods measure page faults.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(m_trim_threshold, -1)
        mallopt(m_mmap_max, 0)


def measure(
    problem: Problem, directions: tuple[str, ...], alternatives: tuple[str, ...], effort: Effort
) -> list[Row]:
    """One row per direction."""
    threads = torch.get_num_threads()
    rows = {
        direction: Row(
            problem.case.name,
            problem.dtype,
            problem.head_dim,
            direction,
            threads,
            problem.case.flops(problem.head_dim, backward=direction == FORWARD_BACKWARD),
            peaks=[],
            bursts={},
        )
        for direction in directions
    }
    on_cpu = problem.device == "cpu"
    clock = wall_clock if on_cpu else gpu.EventClock(problem.device)
    settle_malloc()
    turns: dict[tuple[str, str], Turns] = {}
    ours = build(OURS, problem)
    expected = ours.heads_last(ours.forward()())
    for method in (OURS, *alternatives):
        for direction, row in rows.items():
            try:
                attention = build(method, problem, backward=direction == FORWARD_BACKWARD)
                check(problem, expected, method, attention.heads_last(attention.forward()()))
                turns[method, direction] = Turns(runner(attention, direction), clock)
            except UnavailableError as reason:
                row.missing[method] = str(reason)
            except torch.OutOfMemoryError:
                row.missing[method] = "out of memory"
    for _ in range(effort.rounds):
        if on_cpu:
            peak = peak_flops(problem.dtype, threads)
        else:
            peak = gpu.peak_flops(problem.dtype, problem.device)
        for row in rows.values():
            row.peaks.append(peak)
        for turn in turns.values():
            turn.burst(effort)
    for (method, direction), turn in turns.items():
        rows[direction].bursts[method] = turn.bursts
    return list(rows.values())


def runner(attention: Attention, direction: str) -> Callable[[], object]:
    """A call in one direction."""
    return attention.forward() if direction == FORWARD else attention.forward_backward()
