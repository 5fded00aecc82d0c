# SPDX-License-Identifier: MIT
"""Decorators that skip tests of a `unittest.TestCase` where there is nothing to run them on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from natten._capabilities import has_cuda, has_fna, has_fp64_gemm, has_gemm

__all__ = [
    "fna_supports_additional_kv",
    "skip_if_cuda_is_not_supported",
    "skip_if_fna_is_not_supported",
    "skip_if_gemm_does_not_support_double_precision",
    "skip_if_gemm_is_not_supported",
]

_Test = Callable[..., Any]


def _skip_unless(query: Callable[[], bool]) -> Callable[[_Test], _Test]:
    def decorator(test: _Test) -> _Test:
        @functools.wraps(test)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not query():
                self.skipTest(f"natten.{query.__name__}() is False")
            return test(self, *args, **kwargs)

        return wrapper

    return decorator


def skip_if_cuda_is_not_supported() -> Callable[[_Test], _Test]:
    """Skips a test where `natten.has_cuda` is False. It is asked when the test runs, as by the next three."""
    return _skip_unless(has_cuda)


def skip_if_fna_is_not_supported() -> Callable[[_Test], _Test]:
    """Skips a test where `natten.has_fna` is False."""
    return _skip_unless(has_fna)


def skip_if_gemm_is_not_supported() -> Callable[[_Test], _Test]:
    """Skips a test where `natten.has_gemm` is False."""
    return _skip_unless(has_gemm)


def skip_if_gemm_does_not_support_double_precision() -> Callable[[_Test], _Test]:
    """Skips a test where `natten.has_fp64_gemm` is False."""
    return _skip_unless(has_fp64_gemm)


def fna_supports_additional_kv(head_dim: int) -> bool:
    """Whether fused attention takes additional keys and values with this head dim: all kernels do with any."""
    return True
