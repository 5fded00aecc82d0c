# SPDX-License-Identifier: MIT
"""Names for the types of arguments, as both generations of the package have them."""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeAlias

__all__ = [
    "Backend",
    "Boundary",
    "CausalArg1DType",
    "CausalArg1DTypeOrDed",
    "CausalArg2DType",
    "CausalArg2DTypeOrDed",
    "CausalArg3DType",
    "CausalArg3DTypeOrDed",
    "CausalArgType",
    "CausalArgTypeOrDed",
    "Dimension1DType",
    "Dimension1DTypeOrDed",
    "Dimension2DType",
    "Dimension2DTypeOrDed",
    "Dimension3DType",
    "Dimension3DTypeOrDed",
    "DimensionType",
    "DimensionTypeOrDed",
    "FnaBackwardConfigType",
    "FnaForwardConfigType",
    "KernelSchedule",
    "NoneType",
]

# What windows do at the ends of an axis.
Boundary: TypeAlias = Literal["shift", "mask", "zeros", "valid"]

# Backends, the names that another package has for them, and one policy or instruction set of a backend.
Backend: TypeAlias = Literal[
    "auto",
    "fna",
    "gemm",
    "naive",
    "flex",
    "reference",
    "cutlass-fna",
    "hopper-fna",
    "blackwell-fna",
    "cutlass-fmha",
    "hopper-fmha",
    "blackwell-fmha",
    "flex-fna",
    "flex-fmha",
    "fna:x86-64-v4-bf16",
    "fna:x86-64-v4",
    "fna:x86-64-v3",
    "fna:x86-64-v2",
    "fna:aarch64",
    "fna:Sm80",
    "fna:Sm80Tf32",
    "fna:Sm80Simt",
    "fna:Sm75",
    "fna:Sm70",
    "fna:Sm50",
    "gemm:x86-64-v4-bf16",
    "gemm:x86-64-v4",
    "gemm:x86-64-v3",
    "gemm:x86-64-v2",
    "gemm:aarch64",
    "gemm:Sm80",
    "gemm:Sm80Tf32",
    "gemm:Sm80Simt",
    "gemm:Sm75",
    "gemm:Sm70",
    "gemm:Sm50",
    "naive:baseline",
    "naive:naive",
    "gemm:naive",
]

# One integer per axis.
Dimension1DType: TypeAlias = tuple[int]
Dimension2DType: TypeAlias = tuple[int, int]
Dimension3DType: TypeAlias = tuple[int, int, int]
DimensionType: TypeAlias = Dimension1DType | Dimension2DType | Dimension3DType

# The same, or one integer for all axes.
Dimension1DTypeOrDed: TypeAlias = int | Dimension1DType
Dimension2DTypeOrDed: TypeAlias = int | Dimension2DType
Dimension3DTypeOrDed: TypeAlias = int | Dimension3DType
DimensionTypeOrDed: TypeAlias = int | DimensionType

# One flag per axis.
CausalArg1DType: TypeAlias = tuple[bool]
CausalArg2DType: TypeAlias = tuple[bool, bool]
CausalArg3DType: TypeAlias = tuple[bool, bool, bool]
CausalArgType: TypeAlias = CausalArg1DType | CausalArg2DType | CausalArg3DType

# The same, or one flag for all axes.
CausalArg1DTypeOrDed: TypeAlias = bool | CausalArg1DType
CausalArg2DTypeOrDed: TypeAlias = bool | CausalArg2DType
CausalArg3DTypeOrDed: TypeAlias = bool | CausalArg3DType
CausalArgTypeOrDed: TypeAlias = bool | CausalArgType

# Tile shapes of queries and of keys; for backward passes also splits of the keys, and a flag without effect.
FnaForwardConfigType: TypeAlias = tuple[DimensionType, DimensionType]
FnaBackwardConfigType: TypeAlias = tuple[DimensionType, DimensionType, DimensionType, bool]

NoneType: TypeAlias = type(None)


class KernelSchedule(Enum):
    """Schedules of another package's kernels; accepted as ``kernel_schedule=``, without effect."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2
