# SPDX-License-Identifier: MIT
"""The benchmark's way on a GPU, without one: all but the kernels there, with other clocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import gpu, report
from bench.cases import CASES, GPU_CASES, Case
from bench.measure import FORWARD, FORWARD_BACKWARD, Effort, Row, measure, wall_clock
from bench.methods import ALTERNATIVES, DENSE, OURS, Problem, UnavailableError, build, methods_on
from natten import _C

pytestmark = pytest.mark.cpu
SMALL = Case("small", (16, 16), (5, 5), heads=2)
# Of the CPU's torch device, but not called "cpu": the benchmark takes it for a GPU.
PRETENDED = "cpu:0"


def test_what_is_measured() -> None:
    on_cpu = methods_on(Problem(SMALL, "bf16", 64))
    assert on_cpu == ALTERNATIVES
    policies = {
        dtype: methods_on(Problem(SMALL, dtype, 64, "cuda"))[len(ALTERNATIVES) + 1 :]
        for dtype in ("fp16", "bf16", "fp32", "tf32")
    }
    assert policies == {
        "fp16": ("fna:Sm80", "fna:Sm75", "fna:Sm70", "fna:Sm50"),
        "bf16": ("fna:Sm80", "fna:Sm50"),
        "fp32": ("fna:Sm80Simt", "fna:Sm50"),
        "tf32": ("fna:Sm80Tf32", "fna:Sm80Simt", "fna:Sm50"),
    }


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = [problem.case.name for problem in command.problems(command.parse_arguments([]))]
    assert names == [case.name for case in CASES] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = command.parse_arguments(["--device", "cuda"])
    problems = command.problems(arguments)
    assert [problem.case for problem in problems] == [*GPU_CASES] * 3
    assert [problem.dtype for problem in problems[:: len(GPU_CASES)]] == ["bf16", "tf32", "fp32"]
    assert {(problem.head_dim, problem.device) for problem in problems} == {(128, "cuda")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line, said in (
        (["--device", "cuda"], "--device cuda: torch .* finds no GPU"),
        (["memory", "--device", "cuda"], "--device is not for memory, which takes --case, "),
        (["--dtype", "tf32"], "--dtype tf32 is for GPUs"),
    ):
        with pytest.raises(SystemExit):
            command.parse_arguments(line)
        assert re.search(said, capsys.readouterr().err)


class Event:
    """As torch.cuda.Event, of the CPU's time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], float]:
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return gpu.EventClock(PRETENDED)


def test_clock(clock: gpu.EventClock) -> None:
    """Seconds of the call alone: not of what evicts the caches, which comes before."""
    evicting = clock._evicting
    assert evicting.nbytes >= 64 << 20
    evicting.fill_(1)
    seen = []

    def run() -> None:
        seen.append(int(evicting.max()))
        time.sleep(0.05)

    assert 0.05 <= clock(run) < 0.5
    assert seen == [0]


def test_peak(clock: gpu.EventClock, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(3, 64, 64).unbind()
    monkeypatch.setattr(gpu, "_matrices", lambda dtype, device: matrices)
    monkeypatch.setattr(gpu, "EventClock", lambda device: lambda run: (run(), 0.5)[1])
    assert gpu.peak_flops("fp32", PRETENDED) == 3 * 2 * 64**3 / 0.5
    torch.testing.assert_close(matrices[2], matrices[0] @ matrices[1])


def test_precision() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    for dtype in ("tf32", "fp32", "bf16"):
        with gpu.precision(dtype):
            assert matmul.allow_tf32 == (dtype == "tf32")
        assert matmul.allow_tf32 == before


def test_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "EventClock", lambda device: wall_clock)
    monkeypatch.setattr(gpu, "peak_flops", lambda dtype, device: 1e12)
    problem = Problem(SMALL, "fp32", 32, PRETENDED)
    methods = [name for name in methods_on(problem) if name != "flex"]
    effort = Effort(rounds=1, burst=0.0, budget=0.0)
    rows = measure(problem, (FORWARD, FORWARD_BACKWARD), tuple(methods), effort)
    for row in rows:
        # The policies' kernels are not here, unless other tests have loaded emulated ones.
        assert set(row.seconds) - set(methods) == {OURS}
        assert {"sdpa mask", "gather", DENSE} <= set(row.seconds)
        assert set(row.missing) == set(methods) - set(row.seconds)
        assert row.share_of_peak == pytest.approx(row.flops / row.seconds[OURS] / 1e12)
        assert row.times_dense == pytest.approx(row.seconds[DENSE] / row.seconds[OURS])


def test_out_of_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "EventClock", lambda device: wall_clock)
    monkeypatch.setattr(gpu, "peak_flops", lambda dtype, device: 1e12)
    original = build

    def greedy(method: str, problem: Problem, *, backward: bool = False) -> object:
        if method == "gather":
            raise torch.OutOfMemoryError
        return original(method, problem, backward=backward)

    monkeypatch.setattr("bench.measure.build", greedy)
    effort = Effort(rounds=1, burst=0.0, budget=0.0)
    (row,) = measure(Problem(SMALL, "fp32", 32, PRETENDED), (FORWARD,), ("gather",), effort)
    assert row.missing == {"gather": "out of memory"}
    assert row.times_best is None


def test_masks_and_windows_that_are_too_large() -> None:
    largest = max(GPU_CASES, key=lambda case: case.tokens)
    for method, said in (
        ("sdpa mask", "the mask would take 13 GB"),
        ("gather", "would take .* GB"),
    ):
        with pytest.raises(UnavailableError, match=said):
            build(method, Problem(Case("", largest.grid, largest.kernel_size), "bf16", 1))


def test_ideal_over_dense() -> None:
    """What is written of the cases: how many times fewer pairs they have than dense attention."""
    ratios = [case.tokens**2 / case.pairs for case in GPU_CASES]
    assert ratios == pytest.approx([16, 10.24, 10.24, 11.1, 11.1, 1], rel=1e-2)


def _row(direction: str, case: str, ours: float, dense: float) -> Row:
    seconds = {OURS: ours, "flex": 0.004, DENSE: dense, "fna:Sm75": 0.01}
    bursts: dict[str, list[float | None]] = {name: [time] for name, time in seconds.items()}
    missing = {"gather": "too large"}
    return Row(case, "bf16", 128, direction, 1, 1e12, [800e12], bursts, missing)


def test_table() -> None:
    rows = [
        _row(FORWARD, "one", 0.002, 0.02),
        _row(FORWARD, "two", 0.001, 0.04),
        _row(FORWARD_BACKWARD, "one", 0.008, 0.08),
    ]
    header, lines = report.header(rows), report.cells(rows)
    assert all(len(line) == len(header) for line in lines)
    table = [dict(zip(header, line, strict=True)) for line in lines]
    assert [name for name in header if name.endswith(", us")] == [
        *("flex, us", "dense, us", "fna:Sm75, us", "gather, us"),
    ]
    assert table[0]["us"] == "2,000"
    assert table[0]["% of peak"] == "62.5"
    assert table[0]["dense, us"] == "20,000"
    assert table[0]["gather, us"] == "-"
    assert [line["x dense"] for line in table] == ["10.00", "40.00", "10.00", "20.00"]
    assert [line["x best"] for line in table] == ["2.0", "4.0", "0.5", "2.8"]
    assert table[2]["fwd+bwd / fwd"] == "4.00"
    assert table[3]["problem"] == "geometric mean"
    assert report.missing(rows) == ["gather: too large (3 rows)"]
    slower = [_row(FORWARD, "one", 0.002, 0.01)]
    assert report.regressions(report.Report("", rows), report.Report("", slower), 0.1) == [
        "one bf16 128 forward: x dense -50%"
    ]


def test_every_policy_of_the_table_is_a_method() -> None:
    found = {
        method
        for dtype in ("fp16", "bf16", "tf32")
        for method in methods_on(Problem(SMALL, dtype, 64, "cuda"))
        if method.startswith("fna:")
    }
    assert found == {
        f"{row.backend}:{row.isa}"
        for row in _C.kernels("cuda")
        if row.op == "forward" and row.backend == "fna"
    }
