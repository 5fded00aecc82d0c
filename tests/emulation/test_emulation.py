"""The CUDA kernels on the CPU: the emulation's own test, and every emulated kernel on random problems.

The programs are built by ``make emulation``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build" / "emulation"
PROBLEMS = 9

pytestmark = pytest.mark.skipif(
    not (BUILD / "kernels_test").exists(), reason="needs `make emulation`"
)


def run(*command: str | Path) -> str:
    """What a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kernels() -> list[str]:
    """Names of the emulated kernels."""
    if not (BUILD / "kernels_test").exists():
        return []
    return [line.split(":")[0] for line in run(BUILD / "kernels_test", "0").splitlines()]


def test_layer() -> None:
    """Atoms are what the PTX ISA says, and errors are found."""
    run(BUILD / "layer_test")


@pytest.mark.parametrize("kernel", kernels())
def test_kernel(kernel: str) -> None:
    """Random problems, in other orders of threads and with copies that land late and early, against float64."""
    run(BUILD / "kernels_test", str(PROBLEMS), kernel)
