# SPDX-License-Identifier: MIT
"""What a call costs before any arithmetic, and what importing the package costs beyond importing torch."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import natten

_CALLS = 300
_IMPORT = """
import time, torch
start = time.perf_counter()
import natten
print(time.perf_counter() - start)
"""


def _microseconds(run: Callable[[], object]) -> float:
    """The median over calls, after as many to warm up."""
    times = []
    for _ in range(2 * _CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[_CALLS:]) * 1e6


def overheads() -> dict[str, float]:
    """Microseconds by what is called, on 16 tokens with 3 keys each: next to nothing to compute."""
    tokens = torch.randn(1, 16, 1, 16)
    leaf = tokens.clone().requires_grad_()
    ones = torch.ones_like(tokens)

    def train() -> None:
        torch.autograd.grad(natten.na1d(leaf, leaf, leaf, 3), leaf, ones)

    # A stream: the same call at another place of the grid each time.
    place = itertools.count()

    def stream() -> None:
        at = next(place)
        natten.na1d(
            tokens[:, 8:9], tokens, tokens, 3, grid=2**20, query_origin=at + 8, key_origin=at
        )

    imports = [
        float(subprocess.check_output((sys.executable, "-c", _IMPORT), text=True)) for _ in range(5)
    ]
    return {
        "forward": _microseconds(lambda: natten.na1d(tokens, tokens, tokens, 3)),
        "forward, recorded by autograd": _microseconds(lambda: natten.na1d(leaf, leaf, leaf, 3)),
        "forward + backward": _microseconds(train),
        "forward, a step of a stream": _microseconds(stream),
        "import natten, after torch": statistics.median(imports) * 1e6,
    }
