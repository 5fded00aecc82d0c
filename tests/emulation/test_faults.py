"""Kernels that are wrong on purpose: the emulation must find out.

A fault is a change of the kernels' text, in a copy of their headers. What is changed is compiled and run on random
problems: a wrong result, an error of the emulation, a crash or a timeout counts as found. Every barrier and every wait of
the fused kernels is left out in turn; where that goes unnoticed it must be known to be ordered by another (REDUNDANT).

``make test`` tries a few faults, ``make faults`` (NATTEN_FAULTS=all) all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path("natten/cuda")

FORWARD = r"forward_f16_sm80_d32"
BACKWARD = r"backward_f16_sm80_d32"
# Two groups of threads share the columns of an output, and backward tiles have one stage.
WIDE_FORWARD = r"forward_f16_sm80_d256"
WIDE_BACKWARD = r"backward_f16_sm80_d256"
# Their scores go through shared memory.
SYNCHRONOUS = r"fna_.*_f16_sm50_d32"
QK = r"gemm_qk_f16_sm80_d32"
AV = r"gemm_av_f16_sm80_d32"
AV_TRANSPOSED = r"gemm_av_transposed_f16_sm80_d32"
ROWS = {
    "kernel/fna_forward.hpp": (FORWARD,),
    "kernel/fna_gradient.hpp": (BACKWARD,),
    "kernel/gemm_block.hpp": (AV_TRANSPOSED, AV),
    "kernel/gemm_qk.hpp": (QK,),
    "kernel/rpb_gradient.hpp": (r"gemm_rpb_gradient_f16",),
    "collective/bias_gradient.hpp": (BACKWARD,),
    "collective/block.hpp": (FORWARD, BACKWARD),
    "collective/copy.hpp": (FORWARD,),
    "collective/product.hpp": (FORWARD, SYNCHRONOUS),
    "collective/scores.hpp": (FORWARD,),
    "collective/stream.hpp": (FORWARD, WIDE_FORWARD, WIDE_BACKWARD),
    "collective/walk.hpp": (FORWARD,),
    "collective/weights.hpp": (QK, AV_TRANSPOSED),
}


@dataclass(frozen=True)
class Fault:
    """One change of the text.

    Attributes:
        name: What is wrong then.
        header: File below ``natten/cuda``.
        old: Text that is replaced.
        new: What by.
        place: Which of its occurrences, counted from 0.
    """

    name: str
    header: str
    old: str
    new: str
    place: int = 0

    def apply(self, text: str) -> str:
        """The changed header."""
        parts = text.split(self.old)
        if len(parts) < self.place + 2:
            msg = f"{self.name}: {self.header} no longer says {self.old!r}"
            raise ValueError(msg)
        before, after = parts[: self.place + 1], parts[self.place + 1 :]
        return self.old.join(before) + self.new + self.old.join(after)


BY_HAND = (
    Fault(
        "copies under way where there was no tile",
        "collective/stream.hpp",
        "if (state.tiles == 0)",
        "if (false)",
    ),
    Fault(
        "the rounding error of a maximum",
        "kernel/fna_forward.hpp",
        "(scores_rows(r, c) - base) * params.scale.to_base2",
        "scores_rows(r, c) * params.scale.to_base2 - base * params.scale.to_base2",
    ),
    Fault(
        "LSE and logits rounded differently",
        "kernel/fna_gradient.hpp",
        "params.scale.natural(scores_rows(r, c)) - row_lse",
        "scores_rows(r, c) * params.scale.to_natural - row_lse",
    ),
    Fault(
        "wrong slot of the ring",
        "kernel/fna_forward.hpp",
        "step % kStages",
        "(step + 1) / 2 % kStages",
    ),
    Fault(
        "loads one step late",
        "collective/stream.hpp",
        "issue_ahead(step + kStages - 1)",
        "issue_ahead(step + kStages)",
    ),
    Fault("no rescaling of the sum", "kernel/fna_forward.hpp", "sum[r] *= correction;", ""),
    Fault(
        "no rescaling of the output",
        "kernel/fna_forward.hpp",
        "output_rows(r, c) *= correction;",
        ";",
    ),
    Fault("the maximum forgotten", "kernel/fna_forward.hpp", "maximum[r] = highest;", ""),
    Fault(
        "NaN for rows without keys",
        "kernel/fna_forward.hpp",
        "highest == -INFINITY ? 0.0f : highest",
        "highest",
    ),
    Fault(
        "every lane counts missing keys",
        "kernel/fna_forward.hpp",
        "== 0 ? missing : 0.0f",
        "== 0 ? missing : missing",
    ),
    Fault(
        "overlapping shared memory",
        "kernel/fna_forward.hpp",
        "kRingBegin + kStages * StreamedTile::kBytes",
        "kRingBegin + (kStages - 1) * StreamedTile::kBytes",
    ),
    Fault(
        "the ring overlaps the queries",
        "kernel/fna_forward.hpp",
        "kRingBegin = OwnTile::kBytes",
        "kRingBegin = OwnTile::kBytes / 2",
    ),
    Fault(
        "rows beyond the grid are written",
        "kernel/fna_forward.hpp",
        "present && p[a] < own.tokens.box[a].end",
        "present",
    ),
    Fault("no zeros beyond the head dim", "collective/copy.hpp", "present && inside", "present"),
    Fault(
        "wrong shuffle",
        "collective/scores.hpp",
        "__shfl_xor_sync(0xffffffffu, x, bit)",
        "__shfl_xor_sync(0xffffffffu, x, bit | 4)",
    ),
    Fault(
        "no mask",
        "collective/scores.hpp",
        "bool const attended = (columns >> column) & 1;",
        "bool const attended = true;",
    ),
    Fault(
        "mask only inside",
        "collective/scores.hpp",
        "if (is_interior && bias",
        "if (!is_interior && bias",
    ),
    Fault(
        "a mask off by one",
        "collective/walk.hpp",
        "bits_below<Word>(end <<",
        "bits_below<Word>((end - 1) <<",
    ),
    Fault(
        "all tiles are interior",
        "collective/walk.hpp",
        "bool interior = true;",
        "return true; bool interior = true;",
    ),
    Fault(
        "delta forgotten",
        "kernel/fna_gradient.hpp",
        "slopes_rows(r, c) - row_delta",
        "slopes_rows(r, c)",
    ),
    Fault("wrong slot for LSE", "kernel/fna_gradient.hpp", "tile % kStages * 2 * kStreamed", "0"),
    Fault(
        "a lap forgotten",
        "kernel/fna_gradient.hpp",
        "state.laps = problem.group_size()",
        "state.laps = 1",
    ),
    Fault(
        "no scale",
        "kernel/fna_gradient.hpp",
        "d_first(i) *= float(problem.scale)",
        "d_first(i) *= 1",
    ),
    Fault("slots without a key left", "collective/weights.hpp", "if (is_full) return;", "return;"),
    Fault(
        "missing keys are unused",
        "collective/weights.hpp",
        "is_counted ? Element(0) : unused",
        "unused",
    ),
    Fault(
        "weights of the wrong window",
        "collective/weights.hpp",
        "window(p[a]).begin",
        "window(max(p[a] - 1, 0)).begin",
    ),
    Fault(
        "weights of the first head", "kernel/gemm_block.hpp", "cursor.lap * params", "0 * params"
    ),
    Fault("weights of the last tile", "kernel/gemm_block.hpp", "kOwnsQueries ? 0 : tile %", "0 *"),
    Fault("products that nobody attends to", "kernel/gemm_qk.hpp", "if (!attended) return;", ""),
    Fault(
        "a part forgotten",
        "kernel/rpb_gradient.hpp",
        "first = part * p.rows / p.parts",
        "first = part * p.rows / p.parts + (part > 0)",
    ),
    Fault("a table not cleared", "kernel/fna_gradient.hpp", "table[i] = 0", "table[i] = table[i]"),
)

# What orders threads.
_ORDERING = re.compile(
    r"__sync(?:threads|warp)\(\);|Policy::commit\(\);|Policy::template wait<[^;]*>\(\);"
)


def removals() -> Iterator[Fault]:
    """Every barrier, wait and commit of the kernels, left out."""
    for header in ROWS:
        text = (ROOT / "include" / HEADERS / header).read_text()
        seen: dict[str, int] = {}
        for old in _ORDERING.findall(text):
            place = seen.setdefault(old, 0)
            seen[old] += 1
            yield Fault(f"{header} without {old} ({place})", header, old, "", place)


# Removals that change nothing, and why.
REDUNDANT: dict[str, str] = {
    "collective/stream.hpp without Policy::commit(); (0)": (
        "rows of two stages wait for all copies (cp.async.wait_all), committed or not; it counts from three on"
    ),
}

SAMPLE = (
    "no rescaling of the output",
    "no mask",
    "wrong slot of the ring",
    "copies under way where there was no tile",
)


def tool(name: str) -> str | None:
    """Where a program is: beside this Python, or on the PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


class Build:
    """A program of some rows, in a copy of the headers that faults are put into."""

    def __init__(self, folder: Path, rows: str, sanitize: str = "") -> None:
        self._include = folder / "include"
        self._build = folder / "build"
        self._sanitize = sanitize
        shutil.copytree(ROOT / "include", self._include, dirs_exist_ok=True)
        self._run(
            tool("cmake") or "",
            f"-S{ROOT / 'tests/emulation'}",
            f"-B{self._build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNATTEN_INCLUDE={self._include}",
            f"-DNATTEN_EMULATION_ROWS={rows}",
            f"-DNATTEN_SANITIZE={sanitize}",
        )
        assert not self.finds(None), "the kernels without a fault"

    def finds(self, fault: Fault | None) -> str:
        """What shows that this fault is there; empty: nothing does."""
        if fault is None:
            return self._try()
        header = self._include / HEADERS / fault.header
        correct = header.read_text()
        header.write_text(fault.apply(correct))
        try:
            return self._try()
        finally:
            header.write_text(correct)

    def _try(self) -> str:
        self._run(tool("ninja") or "", "-C", self._build, "-j2", "kernels_test")
        command = [self._build / "kernels_test", "2" if self._sanitize else "9"]
        if self._sanitize:  # which finds no place for its shadow where addresses are random
            command = ["setarch", "--addr-no-randomize", *command]
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=300, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        if run.returncode == 0:
            return ""
        return f"{run.returncode}: {(run.stdout + run.stderr)[:300]}"

    @staticmethod
    def _run(*command: str | Path) -> None:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


class Builds:
    """Builds by what they are of, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._builds: dict[tuple[str, str], Build] = {}

    def __call__(self, rows: str, sanitize: str = "") -> Build:
        """The build of the rows whose names match a regular expression."""
        key = (rows, sanitize)
        if key not in self._builds:
            folder = self._folder / str(len(self._builds))
            self._builds[key] = Build(folder, rows, sanitize)
        return self._builds[key]


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """All builds of this session."""
    if not (ROOT / "build" / "emulation").exists():
        pytest.skip("needs what `make emulation` needs")
    return Builds(tmp_path_factory.mktemp("faults"))


def chosen() -> list[Fault]:
    """The faults to try."""
    if os.environ.get("NATTEN_FAULTS") == "all":
        return [*BY_HAND, *removals()]
    barrier = next(removals())
    return [*(fault for fault in BY_HAND if fault.name in SAMPLE), barrier]


@pytest.mark.parametrize("fault", chosen(), ids=lambda fault: fault.name)
def test_found(fault: Fault, builds: Builds) -> None:
    """A fault is found by what runs of the rows show, or else by ThreadSanitizer."""
    rows = ROWS[fault.header]
    finds = any(builds(regex).finds(fault) for regex in rows)
    if not finds and os.environ.get("NATTEN_FAULTS") == "all":
        finds = any(builds(regex, "thread").finds(fault) for regex in rows)
    assert finds != (fault.name in REDUNDANT)
