# SPDX-License-Identifier: MIT
"""What a user writes, for type checkers (`make lint`): each line that is wrong is marked, and must be found wrong."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import natten
from natten import varlen
from natten.functional import (
    attention,
    na1d,
    na2d_av,
    na2d_qk,
    na3d,
    neighborhood_attention_generic,
)
from natten.types import Backend, Boundary

x = torch.randn(1, 8, 8, 2, 16)
flag = bool(x.sum() > 0)
backend: Backend = "fna"
boundary: Boundary = "mask"

# One tensor, or two with return_lse.
assert_type(natten.na2d(x, x, x, 3), Tensor)
assert_type(natten.na2d(x, x, x, kernel_size=(3, 5), return_lse=False), Tensor)
assert_type(natten.na2d(x, x, x, [3, 5], return_lse=True), tuple[Tensor, Tensor])
assert_type(natten.na2d(x, x, x, 3, return_lse=flag), Tensor | tuple[Tensor, Tensor])
assert_type(na1d(x[0], x[0], x[0], 3), Tensor)
assert_type(na3d(x[None], x[None], x[None], 3, is_causal=(True, False, False)), Tensor)
output, lse = neighborhood_attention_generic(x, x, x, 3, 1, 1, False, return_lse=True)
assert_type(attention(x[0], x[0], x[0], is_causal=True), Tensor)
assert_type(attention(x[0], x[0], x[0], return_lse=True), tuple[Tensor, Tensor])
assert_type(
    varlen.neighborhood_attention_varlen(x[0], x[0], x[0], token_layout_list=[(4, 2)]), Tensor
)
packed, packed_lse = varlen.neighborhood_attention_varlen(
    x[0], x[0], x[0], token_layout_list=[(4, 2)], return_lse=True
)
merged, _ = natten.merge_attentions([output, output], [lse, lse])
assert_type(natten.na2d(x, x, x, 3).sum(), Tensor)

# Modules.
layer = natten.NeighborhoodAttention2D(32, 2, 3, boundary=("shift", "zeros"), backend=backend)
assert_type(layer(x.flatten(-2)), Tensor)
assert_type(layer(x.flatten(-2), return_weights=True), tuple[Tensor, Tensor])
assert_type(layer.forward(x.flatten(-2)), Tensor)

# Settings, halves, and modules that are imported when they are asked for.
with natten.use_backend("fna:Sm80"):
    natten.na2d(x, x, x, 3, boundary=boundary, backend="cutlass-fna")
heads_first = x.movedim(-2, 1)
weights = na2d_qk(heads_first, heads_first, 3).softmax(-1)
assert_type(na2d_av(weights, heads_first, 3, boundary="shift"), Tensor)
natten.flex.flex_na2d(x, x, x, 3)
assert_type(natten.__version__, str)
print(natten.explain(x, x, x, 3).selected)  # noqa: T201

# Wrong.
natten.na2d(x, x, x, 3, dilation="three")  # type: ignore
natten.na2d(x, x, x, 3, boundary="reflect")  # type: ignore
natten.na2d(x, x, x, 3, boundary=("shift", "reflect"))  # type: ignore
natten.na2d(x, x, x, 3, backend="cutlas-fna")  # type: ignore
natten.na2d(x, x, x, 3, is_casual=True)  # type: ignore
natten.na2d(x, x, x)  # type: ignore
natten.na2d(x, x, x, 3, return_lse=True).sum()  # type: ignore
natten.use_backend("cuda")  # type: ignore
natten.NeighborhoodAttention2D(32, 2, 3, boundary="reflect")  # type: ignore
layer(x, 3.5)  # type: ignore
layer(x).shape.nope  # type: ignore
attention(x, x, x, return_lse="yes")  # type: ignore
natten.nope  # type: ignore
natten.flops.nope  # type: ignore
natten.varlen.nope  # type: ignore
