# SPDX-License-Identifier: MIT
"""Where releases until 0.17 keep `natten.NeighborhoodAttention3D`."""

from __future__ import annotations

from natten.legacy import warn_once
from natten.modules import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]

warn_once(f"{__name__}.{__all__[0]}", f"natten.{__all__[0]}")
