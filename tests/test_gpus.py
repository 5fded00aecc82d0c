# SPDX-License-Identifier: MIT
"""What a build without a wish is for, on machines with all kinds of programs that claim to be nvidia-smi and nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
CODEGEN = Path(__file__).parents[1] / "src" / "codegen"
NVCC = """
case "$*" in
  --version) echo "Cuda compilation tools, release ${RELEASE:-12.4}, V12.4.131" ;;
  --list-gpu-code) printf "sm_50\\nsm_75\\nsm_80\\nsm_86\\nsm_90\\n" ;;
  *) echo "$*" > "$CALLS"; [ -z "$HOST_FAILS" ] || { echo "unsupported GNU version"; exit 1; } ;;
esac
"""


def smi(*capabilities: str, cuda: str = "12.4") -> str:
    """A program that says what nvidia-smi says."""
    return f"""
case "$*" in
  *compute_cap*) printf "{"".join(each + chr(92) + "n" for each in capabilities)}" ;;
  *) echo "| NVIDIA-SMI 550.54    Driver Version: 550.54    CUDA Version: {cuda}  |" ;;
esac
"""


@pytest.fixture
def detect(tmp_path):
    """Architectures and warning for two programs; None: there is no such program."""

    def call(nvidia_smi, nvcc=NVCC, **variables):
        for name, text in (("nvidia-smi", nvidia_smi), ("nvcc", nvcc)):
            if text is not None:
                (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
                (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
        compiler = tmp_path / "nvcc" if nvcc is None else None  # a program that is not there
        subprocess.run(
            [
                *(sys.executable, "-B", CODEGEN / "gpus.py", "--timeout", "1"),
                *("--cmake", tmp_path / "native.cmake"),
                *(("--compiler", compiler) if compiler else ()),
            ],
            env={**environment, **variables},
            check=True,
            timeout=60,
        )
        written = (tmp_path / "native.cmake").read_text()
        archs = re.search(r"NATTEN_NATIVE_ARCHS (.*)\)", written)[1]
        warning = re.search(r"NATTEN_NATIVE_WARNING \[==\[(.*)\]==\]", written, re.DOTALL)[1]
        return archs, warning

    return call


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [(["8.6"], "86"), (["9.0"], "90"), (["8.9"], "86"), (["9.0", "8.6", "8.6"], "86 90")],
    ids=str,
)
def test_gpus_that_fit(detect, tmp_path, capabilities, archs):
    assert detect(smi(*capabilities)) == (archs, "")
    for arch in archs.split():
        assert f"code=sm_{arch}" in (tmp_path / "calls").read_text()


def test_no_gpu(detect):
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert detect(None) == ("", "")
    assert detect('echo "No devices were found"; exit 6') == ("", "")


@pytest.mark.parametrize(
    ("nvidia_smi", "variables", "says"),
    [
        ("sleep 100", {}, "did not end within 1 s. Mend that, or name the architecture"),
        ('echo "NVIDIA-SMI has failed"; exit 9', {}, "'NVIDIA-SMI has failed'. Mend that"),
        ('echo "[N/A]"', {}, "does not say of which architecture"),
        (smi("8.6"), {"CUDACXX": "/nonsense"}, "/nonsense cannot be run: No such file"),
        (smi("8.6"), {"CUDACXX": "/bin/true"}, "/bin/true is no nvcc that works"),
        (smi("8.6"), {"RELEASE": "11.7"}, "is of CUDA 11.7; 11.8 is the oldest that works"),
        (
            smi("8.6", cuda="11.4"),
            {},
            "The driver runs programs of CUDA 11.4, and the compiler is of",
        ),
        (smi("8.6"), {"HOST_FAILS": "1"}, "does not compile: unsupported GNU version"),
        (smi("12.9"), {}, "There are no kernels for SM129 that CUDA 12.4 compiles"),
        (smi("3.5"), {}, "There are no kernels for SM35"),
    ],
    ids=[
        "hangs",
        "fails",
        "not-said",
        "no-file",
        "no-nvcc",
        "old",
        "driver",
        "host",
        "new",
        "ancient",
    ],
)
def test_what_does_not_fit_is_a_warning(detect, nvidia_smi, variables, says):
    archs, warning = detect(nvidia_smi, **variables)
    assert archs == ""
    assert says in warning


def test_no_compiler(detect):
    archs, warning = detect(smi("8.6"), nvcc=None)
    assert archs == ""
    assert "cannot be run: No such file" in warning
    assert "Install the CUDA toolkit" in warning


def test_some_of_several_gpus_fit(detect):
    archs, warning = detect(smi("3.5", "8.6"))
    assert archs == "86"
    assert "no kernels for SM35" in warning


REQUIREMENTS = """
import sys
sys.path.insert(0, sys.argv[1])
from build_backend import requirements
print(*requirements(eval(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("settings", "variables", "is_required"),
    [
        ({}, {}, False),
        ({"cmake.define.NATTEN_CUDA_ARCHS": "80;90"}, {}, True),
        ({"cmake.args": ["-DNATTEN_CUDA_ARCHS=80"]}, {}, True),
        ({}, {"CMAKE_ARGS": "-DNATTEN_CUDA=ON"}, True),
        ({"cmake.define.NATTEN_CUDA_ARCHS": "80", "cmake.define.NATTEN_CUDA": "OFF"}, {}, False),
        (
            {
                "cmake.define.NATTEN_CUDA_ARCHS": "80",
                "cmake.define.NATTEN_CUTLASS_DIR": "/cutlass",
            },
            {},
            False,
        ),
    ],
    ids=["nothing", "archs", "args", "environment", "off", "checkout"],
)
def test_cutlass_is_required_where_it_is_needed(tmp_path, settings, variables, is_required):
    pytest.importorskip("scikit_build_core")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    said = subprocess.run(
        [sys.executable, "-B", "-c", REQUIREMENTS, str(CODEGEN), repr(settings)],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("nvidia-cutlass==" in said) == is_required
