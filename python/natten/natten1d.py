# SPDX-License-Identifier: MIT
"""Where releases until 0.17 keep `natten.NeighborhoodAttention1D`."""

from __future__ import annotations

from natten.legacy import warn_of_module
from natten.modules import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]

warn_of_module(__name__, __all__[0])
