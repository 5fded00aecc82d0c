# SPDX-License-Identifier: MIT
"""`python -m bench idle` counts calls between idle probes, and only those."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from bench import idle
from bench.cases import Case
from bench.idle import Call, Patience, Probe, Row
from bench.measure import FORWARD, FORWARD_BACKWARD
from bench.methods import Problem
from bench.peak import integer_additions, peak_flops

pytestmark = pytest.mark.cpu

SMALL = Case("small", (5, 9), (3, 4), batch=2, heads=2)
BUSY, IDLE = 9e9, 12e9


def test_the_machine_itself() -> None:
    assert 1e7 < integer_additions(2) < 1e12
    assert 1e7 < peak_flops("fp32", 2, seconds=1e-3) < 1e15


def test_a_call_is_idle_if_both_probes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [IDLE, IDLE, BUSY, IDLE, IDLE, BUSY, BUSY, BUSY]
    rates = iter(probes)
    monkeypatch.setattr(idle, "integer_additions", lambda threads: next(rates))
    monkeypatch.setattr(idle, "peak_flops", lambda dtype, threads, seconds: 1e12)
    probe = Probe(threads=2)
    calls = [probe.time(lambda: None, "fp32") for _ in range(4)]
    assert [call.additions for call in calls] == [IDLE, BUSY, BUSY, BUSY]
    assert probe.most == IDLE
    row = Row("case", "fp32", 64, FORWARD, 1e9, calls)
    assert row.idle(probe.most) == calls[:1]
    assert row.idle(BUSY) == calls  # of a machine that does no more when it is idle


def test_medians_are_of_idle_calls() -> None:
    busy = [Call(seconds=0.1, peak=50e9, additions=BUSY)] * 5
    forward = Row("case", "fp32", 64, FORWARD, 1e9, [*busy, Call(0.02, 100e9, IDLE)])
    twice = [Call(0.08, 100e9, IDLE), Call(0.04, 200e9, 0.96 * IDLE), Call(0.06, 100e9, IDLE)]
    both = Row("case", "fp32", 64, FORWARD_BACKWARD, 3e9, [*busy, *twice])
    never = dataclasses.replace(both, dtype="bf16", calls=busy)
    header = {name: n for n, name in enumerate(idle.HEADER)}
    lines = idle.cells([forward, both, never], IDLE)
    assert all(len(line) == len(header) for line in lines)

    def column(name: str) -> list[str]:
        return [line[header[name]] for line in lines]

    assert column("calls") == ["6", "8", "5"]
    assert column("idle") == ["1", "3", "0"]
    assert column("us") == ["20,000", "60,000", "-"]
    assert column("GFLOP/s") == ["50.0", "50.0", "-"]
    assert column("% of peak") == ["50.0", "37.5", "-"]  # ratios of a call's own peak
    assert column("all calls, % of peak") == ["20.0", "60.0", "60.0"]
    assert column("fwd+bwd / fwd") == ["-", "3.00", "-"]


@pytest.mark.parametrize("busy", [False, True])
def test_idle_moments_are_waited_for(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([IDLE] + [BUSY if busy else IDLE] * 1_000_000)
    monkeypatch.setattr(idle, "integer_additions", lambda threads: next(rates))
    monkeypatch.setattr(idle, "peak_flops", lambda dtype, threads, seconds: 1e12)
    seconds = itertools.count()
    monkeypatch.setattr(idle, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    probe = Probe(threads=2)
    patience = Patience(calls=3, seconds=50, burst=0)
    directions = (FORWARD, FORWARD_BACKWARD)
    rows = idle.measure(Problem(SMALL, "fp32", 8), directions, patience, probe)
    assert [row.direction for row in rows] == list(directions)
    for row in rows:
        flops = SMALL.flops(8, backward=row.direction == FORWARD_BACKWARD)
        assert row.share_of_peak(row.calls[:1]) == flops / row.calls[0].seconds / 1e12
        if busy:  # to the end; five glances at the clock a round
            assert len(row.calls) == 20
            assert row.idle(probe.most) == []
        else:
            assert len(row.calls) == len(row.idle(probe.most)) == 3
