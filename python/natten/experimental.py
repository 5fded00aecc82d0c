# SPDX-License-Identifier: MIT
"""Fused attention with the positional arguments that `natten.na1d` and so on had in 0.17, where this module is from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from natten._axes import BoolPerAxis, IntPerAxis
from natten._problem import Operands
from natten.legacy import fused

__all__ = ["na1d", "na2d", "na3d"]


def _of_rank(rank: int) -> Callable[..., Tensor]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntPerAxis,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        operands = Operands(query, key, value, additional_keys, additional_values, rpb)
        return fused(rank, None, operands, kernel_size, dilation, is_causal, scale)

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"""`natten.na{rank}d`, with the dilation as its fifth argument, and no stride.

    Arguments are those of `natten.functional.na{rank}d`; ``xformers_kwargs`` has no effect.
    """
    return function


na1d, na2d, na3d = map(_of_rank, (1, 2, 3))
