# SPDX-License-Identifier: MIT
"""What this machine can do at most, and whether it could just now: `peak.cpp`, compiled here on first use."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_SOURCE = Path(__file__).with_name("peak.cpp")


@functools.cache
def _library() -> ctypes.CDLL:
    library = RESULTS / "peak.so"
    if not library.exists() or library.stat().st_mtime < _SOURCE.stat().st_mtime:
        RESULTS.mkdir(exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        flags = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
        own = library.with_suffix(f".{os.getpid()}.so")  # nobody loads half of it
        subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(own), "-ldl"], check=True)
        own.replace(library)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.peak_fp32, loaded.peak_bf16):
        function.argtypes = (ctypes.c_int, ctypes.c_double)
        function.restype = ctypes.c_double
    loaded.integer_additions.argtypes = (ctypes.c_int,)
    loaded.integer_additions.restype = ctypes.c_double
    return loaded


def peak_flops(dtype: str, threads: int, seconds: float = 0.02) -> float:
    """FLOP/s of `threads` threads in fp32 multiply-adds, or for bf16 in its dot product where the CPU has one.

    fp16 counts against fp32: its numbers are converted, as CPUs with fp16 arithmetic are rare.
    """
    library = _library()
    measure = library.peak_bf16 if dtype == "bf16" else library.peak_fp32
    return float(measure(threads, seconds))


def integer_additions(threads: int) -> float:
    """Additions a second on the slowest of `threads` threads, within some 40 us.

    They are fewer, other than FLOP/s, while something else works on the same core: in another process, or, where CPUs are
    hardware threads of a core, beside it.
    """
    return float(_library().integer_additions(threads))
