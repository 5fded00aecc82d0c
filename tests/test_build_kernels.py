# SPDX-License-Identifier: MIT
"""Kernel tables of a user's own, and a sample of the package's: compiled by nvcc where there is one, and for the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from natten.build_kernels import build_kernels, resources

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "examples" / "kernel_table.py"

needs_nvcc = pytest.mark.skipif(
    shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="needs nvcc"
)
needs_emulation = pytest.mark.skipif(
    not (ROOT / "build" / "emulation").exists(), reason="needs what `make emulation` needs"
)


def run(*command: str | Path) -> str:
    """What a program prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_no_table(tmp_path):
    with pytest.raises(
        ValueError, match=r"table = .*/none.py; wanted a Python file with CUDA_ROWS"
    ):
        build_kernels(tmp_path / "none.py", tmp_path / "none.so")


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    with pytest.raises(RuntimeError, match=r"failed:[\s\S]*CUDACXX"):
        build_kernels(TABLE, tmp_path / "none.so", archs="86")
    assert list(tmp_path.iterdir()) == []


def test_resources():
    name = "_ZN6natten4cuda13run_on_deviceINS0_5DeltaIfEEEEvNT_6ParamsE"
    log = f"""ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 52 registers, used 0 barriers, 536 bytes cmem[0]
"""
    assert resources(log) == "Delta<float> for sm_80: 52 registers, 12 bytes of spills"


CHOICES = """
import sys, torch, natten, natten.info
natten.load_kernels(sys.argv[1])
for head_dim in (64, 72, 96, 104):
    x = torch.empty(1, 16, 16, 2, head_dim, dtype=torch.float16, requires_grad=True)
    for arch in ("sm_86", "sm_80"):
        print(head_dim, arch, natten.explain(x, x, x, kernel_size=3, device=arch).selected.kernel)
assert "fna_backward_f16_sm80_d96_64x32" in natten.info.report()
assert sys.argv[1] in natten.info.report()
"""


@pytest.mark.slow
@needs_nvcc
def test_example(tmp_path):
    """The documented command; the library's kernels take what would be padded more, where they are compiled for."""
    library = tmp_path / "my_kernels.so"
    report = run(
        *(sys.executable, "-m", "natten.build_kernels", TABLE),
        *("--archs", "86", "--output", library, "--build-dir", tmp_path / "build"),
    )
    print(report)  # noqa: T201
    assert set(re.findall(r"(\d+) bytes of spills", report)) == {"0"}
    own, padded = "fna_forward_f16_sm80_d96_128x64", "fna_forward_f16_sm80_d128_64x64"
    unpadded = "fna_forward_f16_sm80_d64_64x64"
    assert run(sys.executable, "-c", CHOICES, library).splitlines() == [
        *(f"64 {arch} {unpadded}" for arch in ("sm_86", "sm_80")),
        *(f"72 sm_86 {own}", f"72 sm_80 {padded}", f"96 sm_86 {own}", f"96 sm_80 {padded}"),
        *(f"104 {arch} {padded}" for arch in ("sm_86", "sm_80")),
    ]


@pytest.mark.slow
@needs_emulation
def test_example_on_the_cpu(tmp_path):
    """Its kernels are right: head dim 96 is no power of two."""
    run(
        *("cmake", f"-S{ROOT / 'tests/emulation'}", f"-B{tmp_path}", "-GNinja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DNATTEN_EMULATION_TABLE={TABLE}"),
    )
    run("ninja", "-C", tmp_path, "kernels_test")
    done = run(tmp_path / "kernels_test", "6")
    assert done.count("6 of 6 problems agree") == 2, done


@pytest.mark.slow
@needs_nvcc
def test_sample_of_each_policy(tmp_path):
    """Rows of the package for head dim 64 compile, without spills: all forward, one backward."""
    policies = "f16_sm80|f32_sm80tf32|f32_sm80simt|f16_sm75|f32_sm50"
    rows = f"fna_forward_({policies})_d64|fna_backward_f16_sm80_d64"
    run(
        *("cmake", f"-S{ROOT / 'src/cuda'}", f"-B{tmp_path}", "-GNinja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", "-DNATTEN_CUDA_ARCHS=75;80"),
        *(f"-DNATTEN_CUDA_ONLY={rows}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"),
    )
    report = resources(run("ninja", "-C", tmp_path))
    print(report)  # noqa: T201
    assert len(re.findall("FnaForward|FnaGradient", report)) == 5 + 2
    assert set(re.findall(r"(\d+) bytes of spills", report)) == {"0"}
