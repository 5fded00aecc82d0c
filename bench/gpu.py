# SPDX-License-Identifier: MIT
"""Measuring on a GPU: events around calls that find its caches cold, and its peak by products of large matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.methods import DTYPES

_MIN_EVICTED = 64 << 20  # bytes; the largest L2 below Blackwell's has 60 MB
_PRODUCTS = 3


class EventClock:
    """Seconds that the GPU takes for a call, none of whose operands are in the L2 cache.

    The time to launch is not in it: the CPU launches the call while the GPU still evicts.
    """

    def __init__(self, device: str) -> None:
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(2 * cache, _MIN_EVICTED)
        self._evicting = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._evicting.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Lets float32 products of torch, ours among them, round to TF32 for "tf32", and for nothing else."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@functools.lru_cache(maxsize=4)
def _matrices(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    size = 8192 if dtype.itemsize == 2 else 4096
    # Random numbers: on zeros, a GPU draws less power and clocks higher.
    first, second = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return first, second, torch.empty_like(first)


def peak_flops(dtype: str, device: str) -> float:
    """FLOP/s of torch's product of square matrices; under `precision`."""
    first, second, product = _matrices(DTYPES[dtype], device)

    def multiply() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(first, second, out=product)

    multiply()
    return _PRODUCTS * 2 * len(first) ** 3 / EventClock(device)(multiply)
