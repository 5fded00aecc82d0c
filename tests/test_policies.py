# SPDX-License-Identifier: MIT
"""What the tests of all kernels run, and how they ask for a device that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from natten import _C
from tests import policies

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_every_row_of_the_table_is_in_one_policy(where):
    found = [name for policy in policies.policies(where) for name in policy.kernels]
    rows = [kernel.name for kernel in _C.kernels(where) if kernel.op == "forward"]
    assert sorted(found) == sorted(rows)


def test_what_cannot_run_says_why():
    found = {str(policy): policy for policy in policies.policies("cpu")}
    for policy in found.values():
        isa = policy.backend.split(":")[1]
        assert (policy.obstacle == "") == (isa in ("baseline", *_C.cpu_isas()))
    if not torch.cuda.is_available():
        for policy in policies.policies("cuda"):
            assert "runs on a GPU, and the tensors are on the CPU" in policy.obstacle
    (rounding,) = (p for p in policies.policies("cuda") if p.backend == "fna:Sm80Tf32")
    assert rounding.precision == torch.float16  # TF32 has as many digits
    assert found["naive-baseline-float64"].precision == torch.float64


def test_best_first():
    """So that what is listed first is what runs without a name."""
    names = [policy.backend for policy in policies.policies("cpu")]
    assert names[0] == f"fna:{_C.cpu_isas()[0]}" or _C.cpu_isas() == []


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "quantum"])
def test_a_device_that_is_not_there(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    command = (sys.executable, "-m", "pytest", "--device", name, "tests/test_tiles.py")
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --device {name}: " in done.stderr
    assert "Traceback" not in done.stderr
