"""Finds the GPUs of this machine, and whether its CUDA compiler and driver fit them.

A build that is told nothing of CUDA compiles for these GPUs. Where something does not fit it is a build for the CPU, and
says so: what is wrong here is a warning with a remedy, never a failure.

Usage:
    gpus.py --cmake <file> [--compiler nvcc]   writes what was found for CMake to include
    gpus.py --print-compiler                   prints the CUDA compiler of this machine, or nothing
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from generate import compiled_archs
from table import CUDA_ROWS

OLDEST_TOOLKIT = (11, 8)
# Windows' driver puts it there, and nowhere on the PATH.
WSL_FOLDER = "/usr/lib/wsl/lib"
# Slow where many GPUs wake up; longer means a driver that hangs.
TIMEOUT = 120.0

PROBE = """\
#include <cuda_runtime.h>
__global__ void kernel() {}
int main() {
  kernel<<<1, 1>>>();
  return cudaDeviceSynchronize();
}
"""


class UnfitError(Exception):
    """Something of this machine does not fit its GPUs; the message says what, and what to do."""


@dataclass(frozen=True)
class Native:
    """What a build without a wish is for.

    Attributes:
        archs: Architectures to compile for, such as 86; none: there is no GPU, or it has to do without.
        compiler: The CUDA compiler.
        warnings: What does not fit.
    """

    archs: tuple[int, ...] = ()
    compiler: str = ""
    warnings: tuple[str, ...] = ()


def run(*command: str, timeout: float = TIMEOUT) -> tuple[int, str]:
    """Exit status and output of a program that may hang, even in a way that no signal ends.

    Raises:
        UnfitError: If it cannot be started, or takes longer.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would have to be waited for
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            message = f"{command[0]} cannot be run: {error.strerror}."
            raise UnfitError(message) from None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            message = f"`{shlex.join(command)}` did not end within {timeout:.0f} s."
            raise UnfitError(message) from None
        output.seek(0)
        return status, output.read().decode(errors="replace").strip()


def find_nvidia_smi() -> str | None:
    """The program that knows the GPUs."""
    return shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=WSL_FOLDER)


def find_gpus(timeout: float = TIMEOUT) -> tuple[int, ...]:
    """Architectures of this machine's GPUs, such as 86, oldest first; none where there is no GPU.

    Raises:
        UnfitError: If there is a GPU, and its architecture is not to be found out.
    """
    advice = (
        "Mend that, or name the architecture of the GPU: -C cmake.define.NATTEN_CUDA_ARCHS=86, say."
    )
    program = find_nvidia_smi()
    if program is None:
        if any(Path("/dev").glob("nvidia[0-9]*")):
            message = f"There is an NVIDIA GPU, but no nvidia-smi on the PATH to ask for its architecture. {advice}"
            raise UnfitError(message)
        return ()
    try:
        status, said = run(
            program, "--query-gpu=compute_cap", "--format=csv,noheader", timeout=timeout
        )
    except UnfitError as error:
        message = f"{error} {advice}"
        raise UnfitError(message) from None
    if "No devices were found" in said:
        return ()
    lines = [line.strip() for line in said.splitlines()]
    found = {line.replace(".", "") for line in lines if re.fullmatch(r"\d+\.\d", line)}
    if status or not found:
        message = f"nvidia-smi does not say of which architecture the GPU is, but: {said[:500]!r}. {advice}"
        raise UnfitError(message)
    return tuple(sorted(map(int, found)))


def find_compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The CUDA compiler: the environment's wish, the PATH's, or where toolkits are installed."""
    wish = shlex.split(environment.get("CUDACXX", ""))
    if wish:
        return shutil.which(wish[0]) or wish[0]
    roots = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.pathsep.join(f"{root}/bin" for root in roots if root)
    )


def toolkit_of(compiler: str) -> tuple[int, int]:
    """Version of the CUDA toolkit that a compiler belongs to.

    Raises:
        UnfitError: If it is no nvcc, or too old a one.
    """
    advice = "Install the CUDA toolkit, or set the environment variable CUDACXX to its nvcc."
    try:
        status, said = run(compiler, "--version")
    except UnfitError as error:
        message = f"{error} {advice}"
        raise UnfitError(message) from None
    match = re.search(r"\brelease (\d+)\.(\d+)", said)
    if status or match is None:
        message = f"{compiler} is no nvcc that works: {said[:500]!r}. {advice}"
        raise UnfitError(message)
    version = int(match[1]), int(match[2])
    if version < OLDEST_TOOLKIT:
        message = f"{compiler} is of CUDA {version[0]}.{version[1]}; 11.8 is the oldest that works. {advice}"
        raise UnfitError(message)
    return version


def check_driver(toolkit: tuple[int, int], timeout: float = TIMEOUT) -> None:
    """Raises UnfitError if the driver does not run programs of a toolkit. One that says nothing of CUDA is believed to."""
    program = find_nvidia_smi()
    if program is None:
        return
    _, said = run(program, timeout=timeout)
    match = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+)\.(\d+)", said)
    if match is not None and int(match[1]) < toolkit[0]:
        message = (
            f"The driver runs programs of CUDA {match[1]}.{match[2]}, and the compiler is of CUDA {toolkit[0]}.{toolkit[1]}: "
            f"what it compiles would not run here. Update the driver, or set CUDACXX to an nvcc of CUDA {match[1]}."
        )
        raise UnfitError(message)


def target_for(gpu: int, targets: list[int]) -> int | None:
    """The best of a compiler's targets that runs on a GPU and that the kernel table has kernels for."""
    fitting = [
        target
        for target in targets
        if target <= gpu
        and target // 10 == gpu // 10
        and any(compiled_archs(row, [target], all_policies=False) for row in CUDA_ROWS)
    ]
    return max(fitting, default=None)


def probe(compiler: str, archs: tuple[int, ...]) -> None:
    """Raises UnfitError if a compiler, with its host compiler, makes no program for some architectures."""
    with tempfile.TemporaryDirectory(prefix="natten-") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        host = os.environ.get("CUDAHOSTCXX")
        status, said = run(
            compiler,
            *shlex.split(os.environ.get("CUDAFLAGS", "")),
            *(("-ccbin", host) if host else ()),
            "-std=c++17",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
            *("-o", str(source.with_suffix("")), str(source)),
        )
    if status:
        message = (
            f"{compiler} does not compile: {said[-1000:]}\nIf it refuses the host's g++, set the environment variable "
            "CUDAHOSTCXX to an older one."
        )
        raise UnfitError(message)


def find_native(compiler: str | None = None, timeout: float = TIMEOUT) -> Native:
    """What a build without a wish is for, with this compiler or the one that is found."""
    try:
        gpus = find_gpus(timeout)
        if not gpus:
            return Native()
        compiler = compiler or find_compiler()
        if compiler is None:
            message = (
                "There is an NVIDIA GPU, but no nvcc. Install the CUDA toolkit, or set the environment variable CUDACXX "
                "to its nvcc."
            )
            raise UnfitError(message)
        toolkit = toolkit_of(compiler)
        check_driver(toolkit, timeout)
        _, said = run(compiler, "--list-gpu-code")
        targets = [int(target) for target in re.findall(r"\bsm_(\d+)\b", said)]
        found = {gpu: target_for(gpu, targets) for gpu in gpus}
        name = f"CUDA {toolkit[0]}.{toolkit[1]}"
        warnings = tuple(
            f"There are no kernels for SM{gpu} that {name} compiles, which knows {', '.join(map(str, targets))}: this GPU "
            "will run what torch has (backend flex). If it is newer than the toolkit, install a newer one; if it is "
            "older, an older one; and set CUDACXX to its nvcc."
            for gpu, target in found.items()
            if target is None
        )
        archs = tuple(sorted({target for target in found.values() if target is not None}))
        if archs:
            probe(compiler, archs)
        return Native(archs, compiler, warnings)
    except UnfitError as error:
        return Native(warnings=(str(error),))


def cmake_variables(native: Native) -> str:
    """What CMake includes."""
    return (
        f"set(NATTEN_NATIVE_ARCHS {' '.join(map(str, native.archs))})\n"
        f"set(NATTEN_NATIVE_COMPILER [==[{native.compiler}]==])\n"
        f"set(NATTEN_NATIVE_WARNING [==[{' '.join(native.warnings)}]==])\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cmake", type=Path, help="file to write")
    parser.add_argument("--compiler", help="CUDA compiler; by default the one that is found")
    parser.add_argument("--print-compiler", action="store_true")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="of nvidia-smi, in seconds")
    arguments = parser.parse_args()
    if arguments.print_compiler:
        print(find_compiler() or "", end="")
    if arguments.cmake:
        native = find_native(arguments.compiler, arguments.timeout)
        arguments.cmake.parent.mkdir(parents=True, exist_ok=True)
        arguments.cmake.write_text(cmake_variables(native))


if __name__ == "__main__":
    main()
