# SPDX-License-Identifier: MIT
"""Where releases until 0.17 keep `natten.NeighborhoodAttention1D`."""

from __future__ import annotations

from natten.legacy import warn_once
from natten.modules import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]

warn_once(f"{__name__}.{__all__[0]}", f"natten.{__all__[0]}")
