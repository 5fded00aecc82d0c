# SPDX-License-Identifier: MIT
"""bench/on_gpu.sh: with programs that only write down how they are called, and once on emulated kernels."""

from __future__ import annotations

import filecmp
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policies import EMULATION

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "nvidia-smi": 'case "$*" in *name*) echo "Some GPU, 8.6, 580.1" ;; *) echo 8.6 ;; esac',
    "nvcc": "echo Build cuda_13.0",
    "compute-sanitizer": 'while [ "$1" != python ]; do shift; done; "$@"',
    "python": """
case "$*" in
  *"-m bench"*--load*) echo "| a table |" ;;
  *"-m bench"*) echo '{}' > "$(dirname "$CALLS")/report/bench.json" ;;
  *natten._C*) echo "$(dirname "$CALLS")/installed/_C.so" ;;
  -c*) echo "Python 3.12, torch 2.11" ;;
  *"-m pytest"*) echo "3 passed | in 1 s" ;;
esac
case "$*" in *$HANGS*) exec sleep 60 ;; esac
case "$*" in *$FAILS*) exit 1 ;; esac
""",
}

# In the place of a Python with a GPU: tests run the emulated kernels of one policy, the benchmark those of the CPU.
PYTHON_OF_EMULATION = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if "pip" in words:
    sys.exit()
if "natten._C" in words[1]:
    print(os.environ["INSTALLED"] + "/_C.so")
    sys.exit()
if "pytest" in words:
    words[words.index("cuda")] = "emulation"
    words[words.index("-k") + 1] = "fna-Sm80-float16 and (" + words[words.index("-k") + 1] + ")"
elif "bench" in words:
    words[words.index("cuda")] = "cpu"
os.execv(sys.executable, [sys.executable, *words])
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script; every call but the first word of it fails that contains `fails`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{text}\n')
        (programs / name).chmod(0o755)

    def call(*arguments, fails="nothing", **variables):
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": "python",
            "CALLS": str(tmp_path / "calls"),
            "OUT": str(tmp_path / "report"),
            "FAILS": fails,
            "HANGS": "nothing",
            **variables,
        }
        command = [str(ROOT / "bench" / "on_gpu.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        folder = Path(environment["OUT"])
        return done, (folder / "report.md").read_text(), (tmp_path / "calls").read_text()

    return call


def test_all_stages(run, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "x.whl").touch()
    done, report, calls = run(
        WHEELS=str(tmp_path / "wheels"), PYTEST_ARGS="-k rank2", BENCH_ARGS="--quick --no-flex"
    )
    assert done.returncode == 0, done.stderr
    assert "- Some GPU, 8.6, 580.1" in report
    stages = ("build", "smoke", "bench", "test", "memcheck", "racecheck")
    rows = [
        line for line in report.splitlines() if line.startswith(tuple(f"| {s} " for s in stages))
    ]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {stage}", "passed"] for stage in stages]
    assert "| 3 passed / in 1 s |" in rows[1]
    assert report.endswith("| a table |\n")
    assert f"python -m pip install --no-deps {tmp_path}/wheels/x.whl" in calls
    assert "cmake.define.NATTEN_CUDA=ON" in calls
    assert "cmake.define.NATTEN_CUDA_ARCHS=86 " in calls
    assert calls.index("-m bench") < calls.index("-k rank2") < calls.index("--tool memcheck")
    assert "cmake.define.NATTEN_CUDA_ALL_POLICIES=ON" in calls
    assert "python -m pytest --device cuda --quiet -p no:cacheprovider -k rank2\n" in calls
    for tool in ("memcheck", "racecheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 1 python -m pytest" in calls
        assert (tmp_path / "report" / f"{tool}.log").exists()
    assert f"--json {tmp_path}/report/bench.json --quick --no-flex\n" in calls


def test_some_stages_into_a_folder(run, tmp_path):
    done, report, calls = run("-o", str(tmp_path / "report"), "test", OUT=str(tmp_path / "report"))
    assert done.returncode == 0
    assert "| test | passed |" in report
    assert "pip" not in calls
    assert "bench" not in calls


def test_failures(run):
    done, report, _ = run(fails="--device cuda --quiet")
    assert done.returncode == 1
    assert "| build | passed |" in report
    assert "| test | FAILED |" in report
    assert "| memcheck | FAILED |" in report  # the next ones run all the same
    done, report, _ = run(fails="--no-build-isolation")
    assert done.returncode == 1
    assert "| build | FAILED |" in report
    assert "| test |" not in report  # of what?
    done, report, _ = run("tset")
    assert done.returncode == 1
    assert "no stage is called tset" in done.stdout


def test_a_library_that_was_built_beforehand(run, tmp_path):
    """Nothing of CUDA is compiled, and the library comes to lie beside the package."""
    (tmp_path / "installed").mkdir()
    library = tmp_path / "built.so"
    library.write_text("kernels")
    done, report, calls = run("--library", str(library))
    assert done.returncode == 0, done.stderr
    assert "cmake.define.NATTEN_CUDA=OFF" in calls
    assert "NATTEN_CUDA_ARCHS" not in calls
    assert "nvcc" not in calls
    assert "- kernels: built.so, SHA-256 " in report
    assert (tmp_path / "installed" / "libnatten_cuda.so").read_text() == "kernels"
    assert "| racecheck | passed |" in report


@pytest.mark.slow
@pytest.mark.skipif(not EMULATION.exists(), reason="needs `make emulation`")
def test_on_emulated_kernels(run, tmp_path):
    """Every stage calls pytest, or the benchmark, as they want to be called, and what they find comes into the report."""
    installed = tmp_path / "installed"
    installed.mkdir()
    (tmp_path / "programs" / "python").write_text(PYTHON_OF_EMULATION)
    done, report, _ = run(
        "--library",
        str(EMULATION),
        INSTALLED=str(installed),
        PYTEST_ARGS="tests/test_kernels.py -k rank1-valid",
        BENCH_ARGS="--quick --case 2d-56-k7 --dtype fp32 --forward-only --no-alternatives",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert filecmp.cmp(installed / "libnatten_cuda.so", EMULATION, shallow=False)
    rows = dict(re.findall(r"^\| (\w+) \| passed \| \d+ \| (.*) \|$", report, re.MULTILINE))
    assert list(rows) == ["build", "smoke", "bench", "test", "memcheck", "racecheck"]
    for stage, passed in {"smoke": 3, "test": 1, "memcheck": 6, "racecheck": 2}.items():
        assert rows[stage].startswith(f"{passed} passed, "), rows[stage]
    assert re.search(r"torch \d", report)
    assert re.search(r"\| 2d-56-k7 ", report)  # the benchmark's table


def test_a_stage_that_takes_too_long(run):
    done, report, _ = run("smoke", "bench", HANGS="-m pytest", LIMIT_SMOKE="1")
    assert done.returncode == 1
    assert "| smoke | OUT OF TIME | 1 |" in report or "| smoke | OUT OF TIME | 2 |" in report
    assert "| bench | passed |" in report


def test_limits_fit_a_quarter_of_an_hour():
    """With a library built beforehand; what the head of the script says of them is what it does."""
    text = (ROOT / "bench" / "on_gpu.sh").read_text()
    limits = {
        stage: int(n) for stage, n in re.findall(r"\$\{LIMIT_(\w+):-(\d+)\}", text) if n != "1800"
    }
    assert sum(limits.values()) <= 14.5 * 60
    for stage, seconds in limits.items():
        assert re.search(rf"LIMIT_{stage}\s*(#\s*)?\((1800, with --library )?{seconds}\)", text), (
            stage
        )
