# SPDX-License-Identifier: MIT
"""Fused attention by torch FlexAttention: ``backend="flex"``, under the names it had in 0.17."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from natten._axes import BoolPerAxis, IntPerAxis
from natten._problem import Operands
from natten.legacy import fused

__all__ = ["flex_na1d", "flex_na2d", "flex_na3d"]


def _of_rank(rank: int) -> Callable[..., Tensor]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntPerAxis,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        operands = Operands(query, key, value, additional_keys, additional_values)
        return fused(rank, "flex", operands, kernel_size, dilation, is_causal, None)

    function.__name__ = function.__qualname__ = f"flex_na{rank}d"
    function.__doc__ = f"""``natten.na{rank}d(..., backend="flex")``, with the dilation as its fifth argument.

    Arguments are those of `natten.functional.na{rank}d`; ``xformers_kwargs`` has no effect. Extents and head dims need
    not be multiples of anything.
    """
    return function


flex_na1d, flex_na2d, flex_na3d = map(_of_rank, (1, 2, 3))
