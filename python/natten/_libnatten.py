# SPDX-License-Identifier: MIT
"""What `natten.libnatten` is called from 0.20 on."""

from __future__ import annotations

from natten.libnatten import compute_delta, has_cuda

__all__ = ["compute_delta", "has_cuda"]
