# SPDX-License-Identifier: MIT
"""The benchmark measures what it says: exact FLOPs, the same results from all methods, regressions found."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import report, scaling, unfused
from bench.__main__ import COMMON, MEASUREMENTS, parse_arguments
from bench.cases import CASES, GPU_CASES, Case
from bench.measure import FORWARD, FORWARD_BACKWARD, Effort, Row, measure
from bench.methods import OURS, Problem, build, check
from natten import _C

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
SMALL = Case("small", (5, 9), (3, 4), batch=2, heads=2)
STRIDED = Case("strided", (7, 9), (3, 4), heads=2, stride=(3, 2))


def _row(**changes: object) -> Row:
    bursts: dict[str, list[float | None]] = {
        OURS: [0.02, 0.03, 0.02],
        "sdpa mask": [0.2, 0.3, None],
        "flex": [0.1, 0.15, None],
    }
    row = Row("case", "fp32", 64, FORWARD, 2, 1e9, peaks=[100e9, 66e9, 100e9], bursts=bursts)
    return replace(row, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*CASES, *GPU_CASES, SMALL, STRIDED], ids=lambda case: case.name)
def test_pairs_are_those_of_the_windows(case: Case) -> None:
    pairs = 1
    for extent, kernel_size, stride in zip(case.grid, case.kernel_size, case.strides, strict=True):
        fields = dict.fromkeys(_C.AXIS_FIELDS, 0)
        fields |= {"extent": extent, "query_extent": extent, "key_extent": extent}
        fields |= {"kernel_size": kernel_size, "stride": stride, "dilation": 1}
        fields["boundary"] = _C.BOUNDARIES.index("shift")
        pairs *= _C.attended_pairs(list(fields.values()))
    assert case.pairs == pairs
    assert case.flops(64) == 4 * case.batch * case.heads * pairs * 64


@pytest.mark.parametrize("case", [SMALL, STRIDED], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["sdpa mask", "gather"])
def test_methods_compute_the_same(method: str, case: Case) -> None:
    problem = Problem(case, "fp32", 8)
    ours, other = build(OURS, problem), build(method, problem)
    expected = ours.heads_last(ours.forward()())
    check(problem, expected, method, other.heads_last(other.forward()()))
    for mine, theirs in zip(ours.forward_backward()(), other.forward_backward()(), strict=True):
        torch.testing.assert_close(ours.heads_last(mine), other.heads_last(theirs))


def test_a_method_that_computes_something_else_is_refused() -> None:
    problem = Problem(SMALL, "fp32", 8)
    expected = torch.zeros(2, 45, 2, 8)
    with pytest.raises(ArithmeticError, match="gather differs"):
        check(problem, expected, "gather", expected + 0.01)
    with pytest.raises(ArithmeticError, match="gather differs"):
        check(problem, expected, "gather", expected * math.nan)


def test_measure_fills_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.peak_flops", lambda dtype, threads: 1e12)
    effort = Effort(rounds=4, burst=0.0, budget=0.0)
    directions = (FORWARD, FORWARD_BACKWARD)
    rows = measure(Problem(SMALL, "fp32", 8), directions, ("sdpa mask", "gather"), effort)
    assert [row.direction for row in rows] == list(directions)
    for row in rows:
        assert set(row.seconds) == {OURS, "sdpa mask", "gather"}
        assert row.share_of_peak == pytest.approx(row.flops / row.seconds[OURS] / 1e12)
        for bursts in row.bursts.values():  # three turns, and then the budget is spent
            assert [burst is None for burst in bursts] == [False, False, False, True]


def test_ratios_are_those_of_a_round() -> None:
    row = _row()
    assert row.seconds == {OURS: 0.02, "sdpa mask": 0.25, "flex": 0.125}
    assert row.gflops == pytest.approx(50)
    assert row.share_of_peak == pytest.approx(0.5)
    assert row.times_best == pytest.approx(5)  # not 0.125 / 0.02: medians are of different rounds
    assert row.in_times_of(_row(bursts={OURS: [0.004, 0.006, 0.005]})) == pytest.approx(5)
    assert _row(bursts={OURS: [0.02, 0.02, 0.02]}).times_best is None


def test_regressions_are_ratios() -> None:
    def machine(speed: float, ours: float = 1.0) -> Row:
        times = {OURS: 0.02 * ours, "sdpa mask": 0.2, "flex": 0.1}
        bursts = {method: [time / speed] * 3 for method, time in times.items()}
        return _row(peaks=[100e9 * speed] * 3, bursts=bursts)

    old = report.Report("", [machine(1)])
    assert report.regressions(old, report.Report("", [machine(0.5)]), 0.1) == []
    worse = report.Report("", [machine(1, ours=1.5)])
    found = report.regressions(old, worse, 0.1)
    assert found == [f"case fp32 64 forward: {name} -33%" for name in ("% of peak", "x best")]
    assert report.regressions(old, worse, 0.4) == []


def test_report_survives_saving(tmp_path: Path) -> None:
    result = report.Report("a machine", [_row(missing={"gather": "too large"})])
    result.save(tmp_path / "report.json")
    assert report.Report.load(tmp_path / "report.json") == result


def test_report_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.Report("a machine", [_row()]).save(path)
    path.write_text(path.read_text().replace('"peaks"', '"peak"'))
    with pytest.raises(ValueError, match=f"{path} is of another version .* in peak, peaks; make"):
        report.Report.load(path)
    for option in ("--load", "--compare"):  # said before anything is measured
        command = (sys.executable, "-m", "bench", "--quick", option, str(path))
        ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        assert ended.returncode == 2
        assert f"{option}: {path} is of another version" in ended.stderr


def test_table_goes_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    others = "<!-- benchmark unfused -->\nanother\n<!-- /benchmark unfused -->\n"
    page.write_text(
        f"before\n<!-- benchmark problems -->\nold\n<!-- /benchmark problems -->\n{others}after\n"
    )
    rows = [
        _row(),
        _row(
            direction=FORWARD_BACKWARD,
            bursts={OURS: [0.08, 0.12, 0.08], "sdpa mask": [1.6, 2.4, None]},
        ),
    ]
    result = tmp_path / "report.json"
    report.Report("a machine", rows).save(result)
    command = (sys.executable, "-m", "bench", "--load", str(result), "--into", str(page))
    for _ in range(2):  # the second time, it replaces what the first wrote
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    text = page.read_text()
    assert others in text
    lines = text.splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert sum(line.startswith("| case |") for line in lines) == 2
    assert lines.count("a machine") == 1
    cells = report.cells(rows)
    assert [line[-1] for line in cells] == ["-", "4.00"]
    assert [line[-2] for line in cells] == ["5.0", "20.0"]


def test_page_without_a_place_for_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is measured."""
    page = tmp_path / "page.md"
    for text in (None, "<!-- benchmark problems -->\n<!-- /benchmark problems -->\n"):
        if text is not None:
            page.write_text(text)
        with pytest.raises(SystemExit):
            parse_arguments(["memory", "--into", str(page)])
        assert f"--into {page}: the page must have one <!-- benchmark memory -->" in (
            capsys.readouterr().err
        )
    assert parse_arguments(["problems", "--into", str(page)]).into == page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("idle --quick", "--quick is not for idle, which takes --case, .*--seconds, --threads"),
        ("idle --json report.json", "--json is not for idle"),
        ("unfused --forward-only", "--forward-only is not for unfused"),
        ("memory --device cuda", "--device is not for memory"),
        ("overhead --case 2d-56-k7", "--case is not for overhead"),
        ("--seconds 5", "--seconds is not for problems"),
        ("idle --seconds 0", "--seconds: 0; wanted a number above 0"),
        ("idle --seconds nan", "--seconds: nan; wanted a number above 0"),
        ("--threads 0", "--threads: 0; wanted a whole number from 1 on"),
        ("--head-dim 64 -8", "--head-dim: -8; wanted a whole number from 1 on"),
        ("--threads two", "--threads: two; wanted a whole number from 1 on"),
        ("idle --seconds soon", "--seconds: soon; wanted a number above 0"),
    ],
)
def test_options_that_would_be_ignored(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(line.split())
    assert re.search(message, capsys.readouterr().err)


def test_options_of_each_measurement() -> None:
    known = {name for name in vars(parse_arguments([])) if name != "what"}
    assert set().union(*(what.options for what in MEASUREMENTS.values())) | COMMON == known | {
        "what"
    }
    assert parse_arguments(["idle", "--seconds", "0.5", "--forward-only"]).seconds == 0.5


def test_unfused_methods_compute_the_same() -> None:
    problem = Problem(SMALL, "fp32", 8)
    mine = unfused.runs(unfused.ours(problem), problem, has_rpb=True)
    gathered = unfused.runs(unfused.gathering(problem), problem, has_rpb=False)
    assert set(mine) == set(unfused.OPS)
    for op, call in gathered.items():
        torch.testing.assert_close(mine[op](), call())
    fused = build(OURS, problem)
    torch.testing.assert_close(
        unfused.heads_last(mine[FORWARD]()), fused.heads_last(fused.forward()())
    )


def test_unfused_ops_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.unfused.peak_flops", lambda dtype, threads: 1e12)
    effort = Effort(rounds=1, burst=0.0, budget=0.0)
    rows = {row.op: row for row in unfused.measure(Problem(SMALL, "fp32", 8), effort, gathers=True)}
    assert tuple(rows) == unfused.OPS
    assert rows[FORWARD].flops == SMALL.flops(8)
    assert rows[FORWARD_BACKWARD].flops == 3 * SMALL.flops(8)
    assert set(rows["rpb_gradient"].seconds) == {OURS}
    assert set(rows["qk"].seconds) == {OURS, "gather"}
    assert set(rows[FORWARD].seconds) == {OURS, "gather", "fused"}
    assert len(unfused.cells(list(rows.values()))[0]) == len(unfused.HEADER)


def test_scaling_is_of_a_token_and_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three sides, each call, a table and a plot; what memory has no room for is left out."""
    monkeypatch.setattr(scaling, "SIDES", (8, 16, 24))
    monkeypatch.setattr(scaling, "WINDOWS", (3,))
    monkeypatch.setattr(scaling, "BASE", 16)
    monkeypatch.setattr(scaling, "available_bytes", lambda: 10 << 20)
    monkeypatch.setattr("bench.measure.wall_clock", lambda run: (run() and None) or 1e-3)
    too_large = scaling.problem_of(24, 3)
    monkeypatch.setattr(
        scaling, "bytes_of", lambda problem, call: (20 << 20) * (problem == too_large)
    )
    arguments = parse_arguments(["scaling", "--quick", "--plot", str(tmp_path / "plot.png")])
    assert MEASUREMENTS["scaling"].run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for call in scaling.CALLS:
        (line,) = [line for line in lines if f" {call} " in line]
        assert re.search(r"- \(-\)", line)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_scaling_counts_page_faults() -> None:
    pages = 64
    counted = scaling.Counted(
        lambda: torch.empty(pages * 4096 * 200, dtype=torch.uint8)[::4096].fill_(1)
    )
    counted()
    assert counted.per_call[0] >= pages
    row = scaling.Row(3, FORWARD, ns={32: 9.0, 64: 2.0, 128: 3.0, 256: 2.5}, faults={32: 0.0})
    assert row.growth == pytest.approx(1.5)
    assert scaling.cells([row], (32, 64, 512)) == [
        ["3x3", FORWARD, "9 (0)", "2 (-)", "- (-)", "1.50"]
    ]
    assert scaling.Row(3, FORWARD, ns={32: 9.0}).growth is None


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    """Shares and ratios are medians of those of a round."""
    work = [unfused.Work(flops=4e9, moved=1e9), unfused.Work(flops=0, moved=3e9)]
    bursts: dict[str, list[float | None]] = {
        OURS: [14.0, 28.0, 56.0],
        "gather": [28.0, 112.0, None],
    }
    row = unfused.Row("case", "fp32", 64, "op", work, [1e9, 0.5e9, 2e9], [1e9, 0.5e9, None], bursts)
    assert row.seconds == {OURS: 28.0, "gather": 70.0}
    assert row.share_of_roofline == pytest.approx((4 + 3) / 14)
    assert row.times("gather") == pytest.approx((2 + 4) / 2)
    assert row.times("fused") is None
