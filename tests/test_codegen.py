# SPDX-License-Identifier: MIT
"""What src/codegen makes of tables of CUDA kernels: what it refuses, and for which architectures it compiles what."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from natten import _C

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


def generate(
    folder: Path, archs: str, rows: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs the generator on a table of these rows."""
    table = folder / "my_table.py"
    table.write_text(
        "from table import SM80, SM75, CudaRow, Policy\n"
        'SM86 = Policy("Sm80", "sm80", min_arch=86, max_arch=89)\n'
        f"CUDA_ROWS = ({rows},)\n"
    )
    command = (sys.executable, "-B", str(ROOT / "src/codegen/generate.py"))
    where = ("--cuda-output", str(folder / "out"), "--cuda-archs", archs, "--table", str(table))
    return subprocess.run((*command, *where, *options), capture_output=True, text=True, check=False)


def row(op: str, policy: str = "SM80", head_dim: int = 96, tile: tuple[int, ...] = (64, 64, 2)):
    return f'CudaRow("fna", "{op}", "f16", {policy}, {head_dim}, *{tile})'


@pytest.mark.parametrize("tile", [(64, 128, 2), (512, 64, 2), (64, 256, 1)])
def test_tiles_that_would_compute_garbage(tile, tmp_path):
    done = generate(tmp_path, "80", row("forward", tile=tile))
    assert done.returncode != 0
    said = rf"own = {tile[0]}, streamed = {tile[1]}; wanted at most 256 and 64"
    assert re.search(f"fna_forward_f16_sm80_d96_{tile[0]}x{tile[1]}.*{said}", done.stderr)


def targets(folder: Path) -> dict[str, str]:
    text = (folder / "out" / "cuda_sources.cmake").read_text()
    return dict(re.findall(r"set\(NATTEN_CUDA_TARGETS_(\w+) (.*)\)", text))


def test_policies_that_share_a_template_and_a_tile(tmp_path):
    """Each row is compiled for its own architectures, and the library claims no others."""
    rows = f"{row('forward')}, {row('backward', 'SM86')}, {row('forward', tile=(64, 64, 1))}"
    done = generate(tmp_path, "80;86;90", rows)
    assert done.returncode == 0, done.stderr
    unit = "f16_sm80_d96_64x64"
    assert targets(tmp_path) == {
        unit: "80-real 86-real 90-real 90-virtual",
        f"{unit}_2": "86-real",
        f"{unit}x1": "80-real 86-real 90-real 90-virtual",  # as many stages are part of the name
    }
    for file, entry in ((unit, "fna_forward"), (f"{unit}_2", "fna_backward")):
        text = (tmp_path / "out" / f"{file}.cu").read_text()
        assert re.findall(r"int (\w+?)_f16", text) == [entry]
    table = (tmp_path / "out" / "library_table.cpp").read_text()
    assert f"fna_forward_{unit}_archs[] = {{80, 86, 90}}" in table
    assert f"fna_backward_{unit}_archs[] = {{86}}" in table
    assert f"fna_forward_{unit}_archs, 3, 90," in table  # PTX of the newest
    assert f"fna_backward_{unit}_archs, 1, 0," in table


def test_targets_of_blackwell(tmp_path):
    done = generate(tmp_path, "75;80;100;120", f"{row('forward')}, {row('forward', 'SM75')}")
    assert done.returncode == 0, done.stderr
    assert targets(tmp_path) == {
        "f16_sm80_d96_64x64": "80-real 100-real 120-real 120-virtual",
        "f16_sm75_d96_64x64": "75-real",
    }


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 103, 110, 120, 121, 130])
@pytest.mark.parametrize(("dtype", "policy"), [("float16", "Sm80"), ("float32", "Sm80Simt")])
def test_later_architectures_run_the_best_older_policy(arch, dtype, policy):
    axes = 2 * (8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8)
    for op in ("forward", "backward"):
        problem = _C.Problem(dtype, axes, 1, 1, 1, 48, 48, 0, False, 1.0)
        rows = _C.candidates(problem, op, "auto", "", arch, True)
        assert next(kernel.isa for kernel, reasons in rows if not reasons) == policy
