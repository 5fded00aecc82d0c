# SPDX-License-Identifier: MIT
"""Where releases until 0.17 keep `natten.NeighborhoodAttention2D`."""

from __future__ import annotations

from natten.legacy import warn_of_module
from natten.modules import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

warn_of_module(__name__, __all__[0])
