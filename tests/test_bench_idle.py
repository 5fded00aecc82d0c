# SPDX-License-Identifier: MIT
"""`python -m bench idle` counts calls in idle moments, and only those."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from bench import idle
from bench.cases import Case
from bench.idle import Call, Probe, Row
from bench.measure import FORWARD, FORWARD_BACKWARD
from bench.methods import Problem
from bench.peak import integer_additions, peak_flops

pytestmark = pytest.mark.cpu

SMALL = Problem(Case("small", (5, 9), (3, 4), batch=2, heads=2), "fp32", 8)
BUSY, IDLE = 9e9, 12e9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What probes are to find, one after the other; the clock moves on by a second at each glance."""
    found: list[float] = []
    seconds = itertools.count()
    monkeypatch.setattr(idle, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    monkeypatch.setattr(idle, "TURN_SECONDS", 1000.0)
    monkeypatch.setattr(idle, "integer_additions", lambda threads: found.pop(0))
    monkeypatch.setattr(idle, "peak_flops", lambda dtype, threads, seconds: 1e12)
    return found


def _take_turn(row: Row, probe: Probe) -> int:
    """Returns how often the turn called, whether that counts or not."""
    calls: list[None] = []
    row.take_turn(lambda: calls.append(None), probe)
    return len(calls)


def test_the_machine_itself() -> None:
    assert 1e7 < integer_additions(2) < 1e12
    assert 1e7 < peak_flops("fp32", 2, seconds=1e-3) < 1e15


def test_calls_go_on_while_the_machine_is_idle(machine: list[float]) -> None:
    probe, row = Probe(threads=2), Row(SMALL, FORWARD)
    probe.most = IDLE
    machine += [BUSY, BUSY, IDLE, IDLE, IDLE, 0.97 * IDLE, BUSY]
    assert _take_turn(row, probe) == 4
    assert machine == []
    # The first only warms the caches.
    assert [call.additions for call in row.calls] == [IDLE, 0.97 * IDLE, BUSY]
    assert row.idle(probe) == row.calls[:2]
    machine += [1.05 * IDLE, IDLE, IDLE, BUSY]  # it can do more than was known
    assert _take_turn(row, probe) == 3
    assert [call.additions for call in row.idle(probe)] == [IDLE, IDLE]
    row = Row(SMALL, FORWARD)
    machine += [1.05 * IDLE, 1.2 * IDLE, 1.2 * IDLE, 1.2 * IDLE, BUSY]  # not idle before the first
    assert _take_turn(row, probe) == 4
    assert row.idle(probe) == row.calls[1:2]


def test_a_busy_machine_is_waited_for_until_the_turn_ends(machine: list[float]) -> None:
    probe, row = Probe(threads=2), Row(SMALL, FORWARD)
    probe.most = IDLE
    machine += [BUSY] * 2000
    assert _take_turn(row, probe) == 0
    assert len(machine) == 1000
    machine[:] = [IDLE] * 2000  # one glance at the clock behind each call that counts
    assert _take_turn(row, probe) == 1 + len(row.calls) == 1001
    assert row.idle(probe) == row.calls


def test_problems_take_turns(machine: list[float]) -> None:
    machine += [IDLE] * 1_000_000
    other = Problem(SMALL.case, "bf16", 8)
    directions = (FORWARD, FORWARD_BACKWARD)
    rows = idle.measure([SMALL, other], directions, Probe(threads=2), seconds=4000)
    assert [(row.problem, row.direction) for row in rows] == [
        (problem, direction) for problem in (SMALL, other) for direction in directions
    ]
    assert all(len(row.calls) > 100 for row in rows)
    assert rows[1].flops == 3.5 * rows[0].flops == SMALL.case.flops(8, backward=True)


def test_medians_are_of_idle_calls() -> None:
    def calls(seconds: Iterable[float], peak: float = 100e9, additions: float = IDLE) -> list[Call]:
        return [Call(each, peak, additions) for each in seconds]

    problem = Problem(Case("case", (100, 50), (5, 5), heads=2), "fp32", 8)
    probe = Probe(threads=2)
    probe.most = IDLE
    busy = calls([0.1] * 5, peak=50e9, additions=BUSY)
    flops = problem.case.flops(8)
    at = flops / 100e9  # seconds, at peak
    forward = Row(problem, FORWARD, [*busy, *calls([4 * at] * 15), *calls([2 * at] * 3)])
    backward = Row(problem, FORWARD_BACKWARD, [*busy, *calls([7 * at, 14 * at, 21 * at])])
    never = Row(Problem(problem.case, "bf16", 8), FORWARD, busy)
    (line,) = idle.missing([forward, backward, never], probe)
    assert line.startswith("case bf16 forward: no idle moment was long enough; wait for more")
    header = {name: n for n, name in enumerate(idle.HEADER)}
    lines = idle.cells([forward, backward, never], probe)
    assert all(len(line) == len(header) for line in lines)

    def column(name: str) -> list[str]:
        return [line[header[name]] for line in lines]

    assert column("calls") == ["18", "3", "0"]
    assert column("us") == [f"{4e6 * at:,.0f}", f"{14e6 * at:,.0f}", "-"]
    assert column("GFLOP/s") == ["25.0", "25.0", "-"]
    assert column("% of peak") == ["25.0", "25.0", "-"]
    assert column("fastest tenth") == ["50.0", "50.0", "-"]
    assert column("fwd+bwd / fwd") == ["-", "3.50", "-"]
