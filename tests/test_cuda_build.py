# SPDX-License-Identifier: MIT
"""The package with CUDA kernels, built as users build it: by pip, for a GPU that nvidia-smi claims."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]
ROOT = Path(__file__).parents[1]
SMI = """#!/bin/sh
case "$*" in *compute_cap*) echo {capability} ;; *) echo "CUDA Version: 99.0" ;; esac
"""
LOADED = """
import torch, natten
assert natten.__file__.startswith(__import__("sys").argv[1]), natten.__file__
x = torch.randn(1, 8, 2, 4)
natten.na1d(x, x, x, 3)
print([(kernel.name, *kernel.archs) for kernel in natten._C.kernels("cuda") if kernel.archs])
"""


def environment(tmp_path, capability):
    (tmp_path / "nvidia-smi").write_text(SMI.format(capability=capability))
    (tmp_path / "nvidia-smi").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("capability", "arch"), [("8.6", 86), ("9.0", 90), ("12.0", 120)])
def test_configured_for_the_gpu(tmp_path, capability, arch):
    """The same on the first and the second configuration. Where there are no kernels for it: for the CPU, and loudly."""
    sys.path.insert(0, str(ROOT / "src" / "codegen"))
    try:
        from table import CUDA_ROWS
    finally:
        sys.path.pop(0)
    has_kernels = any(row.policy.min_arch <= arch <= row.policy.max_arch for row in CUDA_ROWS)
    where = environment(tmp_path, capability)
    pybind = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    for _ in range(2):
        said = run(
            *("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"),
            *(f"-Dpybind11_DIR={pybind}", f"-DPython_EXECUTABLE={sys.executable}"),
            env=where,
        )
        assert (f"CUDA kernels for {arch}," in said) == has_kernels, said
        assert ("BUILDING NATTEN FOR THE CPU ONLY" in said) != has_kernels
    run("ninja", "-C", tmp_path / "build", "-n", env=where)


def test_one_row_through_pip(tmp_path):
    options = {"NATTEN_CPU_ONLY": "naive_forward_f32", "NATTEN_CUDA_ONLY": "naive_forward_f32"}
    build = [
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--upgrade"),
        *("--verbose", "--target", tmp_path / "there", f"-Cbuild-dir={tmp_path / 'build'}", "."),
        *(f"-Ccmake.define.{name}={value}" for name, value in options.items()),
    ]
    where = environment(tmp_path, "8.6")
    assert "f32_cuda.cu.o" in run(*build, cwd=ROOT, env=where)
    assert "ninja: no work to do" in run(*build, cwd=ROOT, env=where)  # once more: nothing changed
    said = run(
        *(sys.executable, "-S", "-c", LOADED, tmp_path / "there"),
        cwd=tmp_path,
        env={
            **where,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "there"), *filter(None, sys.path)]),
        },
    )
    assert "[('naive_forward_f32_cuda', 86)]" in said
