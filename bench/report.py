# SPDX-License-Identifier: MIT
"""What was measured, as a table, as JSON, compared with earlier results, and as a plot."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import natten
from bench.measure import FORWARD, FORWARD_BACKWARD, Row
from bench.methods import DENSE, OURS
from natten import _C


@dataclass
class Report:
    """All rows, and the machine they were measured on."""

    machine: str
    rows: list[Row]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Report:
        saved = json.loads(path.read_text())
        wanted = {known.name for known in fields(Row)}
        for row in saved["rows"]:
            if set(row) != wanted:
                different = ", ".join(sorted(set(row) ^ wanted))
                message = f"{path} is of another version of this benchmark, as its rows differ in {different}; make it anew with --json"
                raise ValueError(message)
        return Report(saved["machine"], [Row(**row) for row in saved["rows"]])


def machine(device: str) -> str:
    """CPU (or accelerator), its best ISA, threads, versions, commit."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        said = {name.strip(): value.strip() for name, _, value in lines}
        model = said.get("model name", model)
        if "cpu family" in said:  # names of virtual CPUs may leave out which one it is
            model += f" family {said['cpu family']} model {said['model']}"
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        model = f"{name} (SM{major}{minor}, CUDA {torch.version.cuda}), {model}"
    threads = torch.get_num_threads()
    git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{model} ({_C.cpu_isas()[0]}), {threads} threads, torch {torch.__version__}, "
        f"natten {natten.__version__} at {commit or 'an unknown commit'}"
    )


def methods(rows: Sequence[Row]) -> list[str]:
    """What was measured, or could not be, beside ours."""
    known = dict.fromkeys(name for row in rows for name in (*row.seconds, *row.missing))
    return [name for name in known if name != OURS]


def header(rows: Sequence[Row]) -> list[str]:
    others = methods(rows)
    return [
        *("problem", "dtype", "head dim", "direction", "us", "GFLOP/s", "% of peak"),
        *(f"{name}, us" for name in others),
        *(["x dense"] if DENSE in others else []),
        "x best",
        "fwd+bwd / fwd",
    ]


def cell(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value * unit:,.{digits}f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line per row, and the geometric means of each data type, head dim and direction last."""
    forward = {row.key[:3]: row for row in rows if row.direction == FORWARD}
    others = methods(rows)

    def times_dense(alike: Iterable[Row]) -> list[str]:
        """A cell, if there is a column for it."""
        mean = _geometric_mean(row.times_dense for row in alike)
        return [cell(mean, 2)] if DENSE in others else []

    def backward_ratio(row: Row) -> float | None:
        base = forward.get(row.key[:3])
        return row.in_times_of(base) if base and row.direction == FORWARD_BACKWARD else None

    lines = [
        [
            row.case,
            row.dtype,
            str(row.head_dim),
            row.direction,
            cell(row.seconds[OURS], 0, 1e6),
            cell(row.gflops, 1),
            cell(row.share_of_peak, 1, 100),
            *(cell(row.seconds.get(name), 0, 1e6) for name in others),
            *times_dense([row]),
            cell(row.times_best, 1),
            cell(backward_ratio(row), 2),
        ]
        for row in rows
    ]
    for kind in dict.fromkeys(row.key[1:] for row in rows):
        alike = [row for row in rows if row.key[1:] == kind]
        if len(alike) < 2:
            continue
        lines.append(
            [
                "geometric mean",
                kind[0],
                str(kind[1]),
                kind[2],
                "",
                cell(_geometric_mean(row.gflops for row in alike), 1),
                cell(_geometric_mean(row.share_of_peak for row in alike), 1, 100),
                *("" for _ in others),
                *times_dense(alike),
                cell(_geometric_mean(row.times_best for row in alike), 1),
                cell(_geometric_mean(backward_ratio(row) for row in alike), 2),
            ]
        )
    return lines


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.geometric_mean(present) if present else None


def as_text(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in (0, 1, 3) else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )


def as_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if n in (0, 1, 3) else "---:" for n in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def marks(what: str) -> tuple[str, str]:
    """What a page has before and behind the table of `what`."""
    return f"<!-- benchmark {what} -->", f"<!-- /benchmark {what} -->"


def has_marks(page: Path, what: str) -> bool:
    """Whether there is a page with one place for the table of `what`."""
    return page.is_file() and all(page.read_text().count(mark) == 1 for mark in marks(what))


def write_into(page: Path, what: str, text: str) -> None:
    """Replaces what stands between the marks of `what`."""
    begin, end = marks(what)
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def missing(rows: Sequence[Row]) -> list[str]:
    """Why a method has no time, once per reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for method, reason in row.missing.items():
            where = f"{row.case} {row.dtype} {row.direction}"
            reasons.setdefault(f"{method}: {reason}", []).append(where)
    return [f"{reason} ({len(where)} rows)" for reason, where in reasons.items()]


def regressions(old: Report, new: Report, threshold: float) -> list[str]:
    """Rows whose share of peak, or advantage over the best alternative, fell by more than `threshold` of itself.

    Ratios only: absolute times differ from machine to machine and from day to day.
    """
    before = {row.key: row for row in old.rows}
    found = []
    for row in new.rows:
        if row.key not in before:
            continue
        was = before[row.key]
        ratios = {
            "% of peak": (was.share_of_peak, row.share_of_peak),
            "x best": (was.times_best, row.times_best),
            "x dense": (was.times_dense, row.times_dense),
        }
        for name, (old_value, new_value) in ratios.items():
            if old_value and new_value and new_value < old_value * (1 - threshold):
                change = new_value / old_value - 1
                found.append(f"{' '.join(map(str, row.key))}: {name} {change:+.0%}")
    return found


def plot(report: Report, path: Path) -> None:
    """Share of peak of every method, one panel per data type and direction."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row.key[1:] for row in report.rows))
    figure, axes = pyplot.subplots(len(kinds), figsize=(9, 3 * len(kinds)), squeeze=False)
    shown = [OURS, *methods(report.rows)]
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        rows = [row for row in report.rows if row.key[1:] == kind]
        width = 0.8 / len(shown)
        for n, method in enumerate(shown):
            bars = [100 * (row.share_of(method) or 0.0) for row in rows]
            positions = [x + width * (n - (len(shown) - 1) / 2) for x in range(len(rows))]
            axis.bar(positions, bars, width, label=method)
        axis.set_yscale("log")
        axis.set_ylim(0.05, 100)
        axis.set_ylabel("% of peak")
        axis.set_xticks(range(len(rows)), [row.case for row in rows])
        axis.set_title(f"{kind[0]}, head dim {kind[1]}, {kind[2]}", fontsize=10)
    axes[0, 0].legend(ncols=len(shown), fontsize=8)
    figure.suptitle(report.machine, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
