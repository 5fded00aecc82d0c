# SPDX-License-Identifier: MIT
"""How kernels are launched (natten/cuda/launch.hpp): with a runtime that only counts, and what nvcc makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
NVCC = os.environ.get("CUDACXX", "nvcc")


def test_failed_launches(tmp_path):
    """Each is reported once, and the runtime keeps nothing of it."""
    program = tmp_path / "launch_test"
    includes = (f"-I{ROOT / 'tests/launch'}", f"-I{ROOT / 'include'}")
    source = str(ROOT / "tests/launch/launch_test.cpp")
    compiler = os.environ.get("CXX", "g++")
    subprocess.run((compiler, "-std=c++17", *includes, source, "-o", str(program)), check=True)
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


KERNEL = """
#include "natten/cuda/launch.hpp"
struct Kernel {
  using Params = int;
  static constexpr int kThreads = 32, kMinBlocks = 1;
  __device__ void operator()(int, char*) const {}
};
void run_for_%(arch)s(natten::cuda::Launcher const& launch) { launch(Kernel{}, 0, 1, 0); }
"""


@pytest.mark.skipif(shutil.which(NVCC) is None, reason="needs nvcc")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_stubs_have_internal_linkage(tmp_path):
    """Units for two architectures with the same kernel keep two of it, each with its own code.

    Also with stubs as CUDA 12 makes them: weak, which a linker merges, unless the kernel is static.
    """
    version = subprocess.run((NVCC, "--version"), capture_output=True, text=True, check=True).stdout
    major = int(re.search(r"release (\d+)", version)[1])
    flags = ["-static-global-template-stub=false"] if major >= 13 else []
    objects = []
    for arch in (80, 90):
        source = tmp_path / f"unit{arch}.cu"
        source.write_text(KERNEL % {"arch": arch})
        objects.append(source.with_suffix(".o"))
        command = (NVCC, "-std=c++17", f"-arch=sm_{arch}", *flags, f"-I{ROOT / 'include'}", "-c")
        subprocess.run((*command, str(source), "-o", str(objects[-1])), check=True)
    library = tmp_path / "libunits.so"
    for file in (*objects, library):
        if file is library:  # without a runtime: nothing is run
            compiler = os.environ.get("CXX", "g++")
            partial = (compiler, "-r", "-nostdlib", *map(str, objects), "-o", str(library))
            subprocess.run(partial, check=True)
        listed = subprocess.run(("nm", "-C", str(file)), capture_output=True, text=True, check=True)
        kinds = re.findall(r"(\w) void natten::cuda::run_on_device<Kernel>", listed.stdout)
        assert kinds == ["t"] * (2 if file is library else 1), listed.stdout
