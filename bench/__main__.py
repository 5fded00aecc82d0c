# SPDX-License-Identifier: MIT
"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench import gpu, idle, measure, memory, overhead, report, scaling, unfused
from bench.cases import CASES, GPU_CASES
from bench.measure import FORWARD, FORWARD_BACKWARD, QUICK, Effort, Row
from bench.methods import DTYPES, Problem, methods_on


def problems(arguments: argparse.Namespace) -> list[Problem]:
    return [
        Problem(case, dtype, head_dim, arguments.device)
        for head_dim in arguments.head_dim
        for dtype in arguments.dtype
        for case in (*CASES, *GPU_CASES)
        if case.name in arguments.case
    ]


def directions(arguments: argparse.Namespace) -> tuple[str, ...]:
    return (FORWARD,) if arguments.forward_only else (FORWARD, FORWARD_BACKWARD)


def warn_of_load() -> None:
    busy = os.getloadavg()[0]
    if busy > 0.3:
        print(
            f"Load average is {busy:.1f}: on an idle machine, results are better.", file=sys.stderr
        )


def effort_of(arguments: argparse.Namespace) -> Effort:
    return QUICK if arguments.quick else Effort()


def measured(arguments: argparse.Namespace) -> report.Report:
    warn_of_load()
    skipped = {"flex"} if arguments.no_flex else set()
    rows: list[Row] = []
    for problem in (bar := tqdm(problems(arguments), leave=False)):
        bar.set_description(f"{problem.case.name} {problem.dtype}")
        others = () if arguments.no_alternatives else methods_on(problem)
        others = tuple(name for name in others if name not in skipped)
        with gpu.precision(problem.dtype):
            rows += measure.measure(problem, directions(arguments), others, effort_of(arguments))
    rows.sort(key=lambda row: (row.head_dim, row.dtype != "fp32", row.dtype, row.direction))
    return report.Report(report.machine(arguments.device), rows)


def show(
    arguments: argparse.Namespace, machine: str, header: Sequence[str], lines: list[list[str]]
) -> None:
    """Prints a table, and puts it where else it is wanted."""
    render = report.as_markdown if arguments.markdown else report.as_text
    print(machine, render(header, lines), sep="\n\n")
    if arguments.into:
        text = f"{machine}\n\n{report.as_markdown(header, lines)}"
        report.write_into(arguments.into, arguments.what, text)


def saved(option: str, path: Path | None) -> report.Report | None:
    """A report that an option names; ends with 2, as for any wrong argument, if there is none."""
    try:
        return report.Report.load(path) if path else None
    except (OSError, ValueError) as error:
        print(f"{option}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run_problems(arguments: argparse.Namespace) -> int:
    loaded, old = saved("--load", arguments.load), saved("--compare", arguments.compare)
    result = loaded or measured(arguments)
    show(arguments, result.machine, report.header(result.rows), report.cells(result.rows))
    for line in report.missing(result.rows):
        print(line, file=sys.stderr)
    if arguments.json:
        result.save(arguments.json)
    if arguments.plot:
        report.plot(result, arguments.plot)
    if not old:
        return 0
    worse = report.regressions(old, result, arguments.threshold)
    print(
        f"\n{len(worse)} ratios fell by more than {arguments.threshold:.0%} since {arguments.compare}"
    )
    print(*worse, sep="\n")
    return 1 if worse else 0


def run_idle(arguments: argparse.Namespace) -> int:
    probe = idle.Probe(arguments.threads)
    rows = idle.measure(problems(arguments), directions(arguments), probe, arguments.seconds)
    show(arguments, report.machine("cpu"), idle.HEADER, idle.cells(rows, probe))
    for line in idle.missing(rows, probe):
        print(line, file=sys.stderr)
    return 0


def run_unfused(arguments: argparse.Namespace) -> int:
    warn_of_load()
    effort, gathers = effort_of(arguments), not arguments.no_alternatives
    rows = [
        row
        for problem in tqdm(problems(arguments), leave=False)
        for row in unfused.measure(problem, effort, gathers=gathers)
    ]
    show(arguments, report.machine("cpu"), unfused.HEADER, unfused.cells(rows))
    return 0


def run_memory(arguments: argparse.Namespace) -> int:
    header = ("problem", "dtype", "head dim", "direction", "MB", "MB a thread")
    lines = []
    for problem in tqdm(problems(arguments), leave=False):
        for direction in (*directions(arguments), *memory.UNFUSED):
            extra = memory.extra_bytes(problem, direction, arguments.threads) / 1e6
            name = (problem.case.name, problem.dtype, str(problem.head_dim), direction)
            lines.append([*name, f"{extra:.2f}", f"{extra / arguments.threads:.2f}"])
    show(arguments, report.machine("cpu"), header, lines)
    return 0


def run_scaling(arguments: argparse.Namespace) -> int:
    warn_of_load()
    kinds = [(window, call) for window in scaling.WINDOWS for call in scaling.CALLS]
    effort = effort_of(arguments)
    rows = [scaling.measure(*kind, scaling.SIDES, effort) for kind in tqdm(kinds, leave=False)]
    machine = report.machine("cpu")
    show(arguments, machine, scaling.header(scaling.SIDES), scaling.cells(rows, scaling.SIDES))
    if arguments.plot:
        scaling.plot(rows, machine, arguments.plot)
    return 0


def run_overhead(arguments: argparse.Namespace) -> int:
    lines = [[name, f"{value:,.1f}"] for name, value in overhead.overheads().items()]
    show(arguments, report.machine("cpu"), ("call", "us"), lines)
    return 0


class Measurement(NamedTuple):
    """What can be measured.

    Attributes:
        run: Measures it, shows it, and returns the exit status.
        options: Those it heeds, besides COMMON.
        help: What it is.
    """

    run: Callable[[argparse.Namespace], int]
    options: frozenset[str]
    help: str


COMMON = frozenset({"what", "threads", "markdown", "into"})
OF_PROBLEMS = frozenset({"case", "dtype", "head_dim"})
MEASUREMENTS = {
    "problems": Measurement(
        run_problems,
        OF_PROBLEMS
        | {"device", "forward_only", "no_flex", "no_alternatives", "quick"}
        | {"load", "json", "plot", "compare", "threshold"},
        "the named problems (default)",
    ),
    "idle": Measurement(
        run_idle,
        OF_PROBLEMS | {"forward_only", "seconds"},
        "our kernels alone in moments when the machine is idle",
    ),
    "unfused": Measurement(
        run_unfused, OF_PROBLEMS | {"no_alternatives", "quick"}, "the unfused ops one by one"
    ),
    "scaling": Measurement(
        run_scaling,
        frozenset({"quick", "plot"}),
        "ns a token and head, and page faults a call, of pictures of all sizes",
    ),
    "overhead": Measurement(run_overhead, frozenset(), "the cost of a call and of the import"),
    "memory": Measurement(
        run_memory,
        OF_PROBLEMS | {"forward_only"},
        "the memory of a call above its inputs and outputs",
    ),
}


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"{text}; wanted a whole number from 1 on"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"{text}; wanted a number above 0"
        raise argparse.ArgumentTypeError(msg)
    return number


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures neighborhood attention against the machine's peak and against the exact "
        "alternatives in torch, all in turns in one process. FLOPs count attended pairs only. On a GPU also against "
        "dense attention, and with every policy that can run there.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=MEASUREMENTS,
        default="problems",
        help="; ".join(f"{name}: {what.help}" for name, what in MEASUREMENTS.items()),
    )
    names = [case.name for case in (*CASES, *GPU_CASES)]
    parser.add_argument(
        "--case", nargs="+", choices=names, help="by default, those for the kind of device"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="by default fp32 and bf16; tf32 too on a GPU"
    )
    parser.add_argument(
        "--head-dim", nargs="+", type=positive_int, help="by default 64, and 128 on a GPU"
    )
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda for the problems")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument(
        "--no-flex", action="store_true", help="saves its compilation, 10 s a problem"
    )
    parser.add_argument("--no-alternatives", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=120.0,
        help="of idle: how long to wait for idle moments, altogether (default: %(default)s)",
    )
    parser.add_argument("--load", type=Path, help="show a saved report instead of measuring")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument(
        "--into",
        type=Path,
        help="put the table between the marks <!-- benchmark WHAT --> of this page",
    )
    parser.add_argument("--json", type=Path, help="save the report")
    parser.add_argument(
        "--plot", type=Path, help="save a plot of the shares of peak, or of scaling"
    )
    parser.add_argument("--compare", type=Path, help="exit with 1 if ratios fell since this report")
    parser.add_argument("--threshold", type=float, default=0.1, help="of --compare, a fraction")
    arguments = parser.parse_args(line)
    heeded = COMMON | MEASUREMENTS[arguments.what].options
    for name, value in vars(arguments).items():
        if name not in heeded and value != parser.get_default(name):
            takes = ", ".join(option_of(each) for each in sorted(heeded - {"what"}))
            parser.error(f"{option_of(name)} is not for {arguments.what}, which takes {takes}")
    on_cpu = arguments.device == "cpu"
    if not on_cpu and not arguments.load and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch {torch.__version__} finds no GPU")
    arguments.case = arguments.case or [case.name for case in (CASES if on_cpu else GPU_CASES)]
    arguments.dtype = arguments.dtype or (["fp32", "bf16"] if on_cpu else ["bf16", "tf32", "fp32"])
    arguments.head_dim = arguments.head_dim or [64 if on_cpu else 128]
    if on_cpu and "tf32" in arguments.dtype:
        parser.error("--dtype tf32 is for GPUs")
    if arguments.into and not report.has_marks(arguments.into, arguments.what):
        begin, end = report.marks(arguments.what)
        parser.error(
            f"--into {arguments.into}: the page must have one {begin} and one {end}; put them where the table belongs"
        )
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    return MEASUREMENTS[arguments.what].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
