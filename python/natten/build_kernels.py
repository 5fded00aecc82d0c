# SPDX-License-Identifier: MIT
"""``python -m natten.build_kernels``: compiles a table of one's own into a library for `natten.load_kernels`."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from natten import _C
from natten._errors import reject

SOURCE = Path(_C.__file__).parent / "source"


def build_kernels(
    table: str | os.PathLike[str],
    output: str | os.PathLike[str],
    archs: str = "native",
    build_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Compiles the rows of a kernel table into a library.

    Needs CMake 3.20, a CUDA toolkit (11.8 or later) and its host compiler. The headers of CUTLASS are those of the package
    nvidia-cutlass, which must be installed; the error says how, if it is not.

    Args:
        table: A Python file with ``CUDA_ROWS``, like ``examples/kernel_table.py``.
        output: The library to write.
        archs: Architectures to compile for, such as ``"86;89"``, or ``"native"``: those of this machine's GPUs.
        build_dir: Where to compile, kept for the next time; none: a temporary folder.

    Returns:
        What the compiler says of each kernel: registers, bytes of spills.

    Raises:
        ValueError: If there is no such table, or the package was installed without its sources.
        RuntimeError: If CMake or the compiler fails, with what they said.

    Example:
        >>> from natten.build_kernels import build_kernels
        >>> build_kernels("my_table.py", "my_kernels.so", archs="86")  # doctest: +SKIP
    """
    table, output = Path(table).resolve(), Path(output).resolve()
    if not table.is_file():
        reject("table", table, "a Python file with CUDA_ROWS")
    if not SOURCE.is_dir():
        reject(
            "natten's sources", SOURCE, "there; install natten by pip, from a wheel or from source"
        )
    with tempfile.TemporaryDirectory(prefix="natten-") as temporary:
        folder = Path(build_dir or temporary).resolve()
        ninja = _tool("ninja")
        _run(
            _tool("cmake") or "cmake",
            f"-S{SOURCE / 'src/cuda'}",
            f"-B{folder}",
            *(("-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNATTEN_CUDA_TABLE={table}",
            f"-DNATTEN_CUDA_ARCHS={archs}",
            "-DNATTEN_CUDA_LIBRARY=kernels",
            "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
        )
        log = _run(_tool("cmake") or "cmake", "--build", str(folder))
        output.parent.mkdir(parents=True, exist_ok=True)
        # By renaming: a process may have the old one in use.
        copy = shutil.copy(folder / "libkernels.so", output.with_name(output.name + ".new"))
        Path(copy).replace(output)
    return resources(log)


def resources(log: str) -> str:
    """A line for each kernel and architecture, from what ``nvcc -Xptxas=-v`` reports."""
    compiled = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    lines = set()
    for match in compiled.finditer(log):
        spills = int(match["stores"]) + int(match["loads"])
        lines.add(
            f"{match['kernel']} for {match['arch']}: {match['registers']} registers, {spills} bytes of spills"
        )
    readable = _run("c++filt", input="\n".join(sorted(lines)))
    # void natten::cuda::run_on_device<natten::cuda::Delta<float> >(natten::cuda::Delta<float>::Params)
    return re.sub(
        r"void run_on_device<(.*?) ?>\(.*?\) for", r"\1 for", re.sub(r"\w+::", "", readable)
    )


def _tool(name: str) -> str | None:
    """A program of this Python's environment, or else on the PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def _run(*command: str, input: str = "") -> str:
    try:
        done = subprocess.run(
            command,
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        message = f"{command[0]} was not found; run `{sys.executable} -m pip install cmake ninja`"
        raise RuntimeError(message) from None
    if done.returncode != 0:
        message = f"`{' '.join(command)}` failed:\n{done.stdout[-4000:]}"
        raise RuntimeError(message)
    return done.stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m natten.build_kernels", description=__doc__)
    parser.add_argument("table", help="Python file with CUDA_ROWS (examples/kernel_table.py)")
    parser.add_argument("--output", required=True, help="the library, for natten.load_kernels")
    parser.add_argument("--archs", default="native", help='such as "86;89" (this machine\'s GPUs)')
    parser.add_argument("--build-dir", help="where to compile, kept for the next time")
    options = parser.parse_args()
    try:
        report = build_kernels(options.table, options.output, options.archs, options.build_dir)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{error}")
    print(f"{report}\n{options.output}")  # noqa: T201


if __name__ == "__main__":
    main()
