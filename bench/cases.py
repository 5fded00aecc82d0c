# SPDX-License-Identifier: MIT
"""The named problems. Benchmark and tests measure and check the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Neighborhood attention of default semantics: every query attends to exactly `kernel_size` keys."""

    name: str
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    batch: int = 1
    heads: int = 4
    stride: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """One per axis."""
        return self.stride or (1,) * len(self.grid)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs of one head."""
        return self.tokens * math.prod(self.kernel_size)

    def flops(self, head_dim: int, *, backward: bool = False) -> float:
        """Useful FLOPs: two products per pair forward, five more backward (one of them recomputes the logits)."""
        forward = 4.0 * self.batch * self.heads * self.pairs * head_dim
        return forward * 3.5 if backward else forward


CASES = (
    Case("2d-56-k7", (56, 56), (7, 7)),
    Case("2d-64-k13", (64, 64), (13, 13)),
    Case("2d-32-k31", (32, 32), (31, 31)),
    Case("1d-4096-k255", (4096,), (255,)),
    Case("3d-16x32x32-k5x7x7", (16, 32, 32), (5, 7, 7)),
)

# Sequences, images and videos that GPUs are used for, and one of ordinary dense attention.
GPU_CASES = (
    Case("1d-32768-k2048", (32768,), (2048,), heads=1),
    Case("2d-256-k80", (256, 256), (80, 80), heads=24),
    Case("2d-256-k80-s16", (256, 256), (80, 80), heads=24, stride=(16, 16)),
    Case("3d-30x48x80-k18x24x24", (30, 48, 80), (18, 24, 24), heads=24),
    Case("3d-30x48x80-k18x24x24-s16x8x8", (30, 48, 80), (18, 24, 24), heads=24, stride=(16, 8, 8)),
    Case("2d-128-k128", (128, 128), (128, 128), heads=24),
)
