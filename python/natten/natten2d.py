# SPDX-License-Identifier: MIT
"""Where releases until 0.17 keep `natten.NeighborhoodAttention2D`."""

from __future__ import annotations

from natten.legacy import warn_once
from natten.modules import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

warn_once(f"{__name__}.{__all__[0]}", f"natten.{__all__[0]}")
