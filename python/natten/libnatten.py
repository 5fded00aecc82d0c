# SPDX-License-Identifier: MIT
"""What callers reach into the extension module of older releases for, with its arguments: results are written in place.

Fused tensors are heads last, unfused ones heads first. Tile shapes and splits are taken and have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from natten import _attend, _dispatch
from natten._axes import BoolPerAxis, IntPerAxis
from natten._capabilities import has_cuda, has_gemm
from natten._errors import reject
from natten._ops import BACKWARD
from natten._problem import (
    AvOperands,
    Operands,
    Problem,
    QkOperands,
    describe,
    normalize,
    normalize_av,
    normalize_qk,
)
from natten._unfused import AV, AV_TRANSPOSED, QK, RPB_GRADIENT
from natten.context import (
    is_gemm_na_enabled,
    is_tf32_in_gemm_na_enabled,
    is_tiled_na_enabled,
    use_gemm_na,
    use_tf32_in_gemm_na,
    use_tiled_na,
)
from natten.types import Boundary

__all__ = [
    "compute_delta",
    "get_gemm_na",
    "get_gemm_tf32",
    "get_tiled_na",
    "has_cuda",
    "has_gemm",
    "na1d_av_backward",
    "na1d_av_forward",
    "na1d_backward",
    "na1d_forward",
    "na1d_qk_backward",
    "na1d_qk_forward",
    "na2d_av_backward",
    "na2d_av_forward",
    "na2d_backward",
    "na2d_forward",
    "na2d_qk_backward",
    "na2d_qk_forward",
    "na3d_av_backward",
    "na3d_av_forward",
    "na3d_backward",
    "na3d_forward",
    "na3d_qk_backward",
    "na3d_qk_forward",
    "set_gemm_na",
    "set_gemm_tf32",
    "set_tiled_na",
]

# Whatever releases until 0.17 knew about windows.
_BOUNDARY: tuple[Boundary, int] = ("shift", 0)
_WHOLE_GRID = (None, None, None)


def compute_delta(out: Tensor, d_out: Tensor, delta: Tensor) -> None:
    """Writes the sum of ``out * d_out`` over the last dim.

    Args:
        out: ``[..., head_dim]``.
        d_out: The same.
        delta: ``[...]``, float32.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from natten.libnatten import compute_delta
        >>> delta = torch.empty(2)
        >>> compute_delta(torch.ones(2, 3), torch.full((2, 3), 2.0), delta)
        >>> delta
        tensor([6., 6.])
    """
    if out.shape != d_out.shape:
        reject("d_out.shape", tuple(d_out.shape), f"{tuple(out.shape)}, that of out")
    if delta.shape != out.shape[:-1]:
        reject(
            "delta.shape", tuple(delta.shape), f"{tuple(out.shape[:-1])}, out's without the last"
        )
    delta.copy_((out.to(delta.dtype) * d_out.to(delta.dtype)).sum(-1))


def _write(name: str, target: Tensor, result: Tensor) -> None:
    """Copies a result to where the caller wants it; `copy_` alone would also fill what is larger."""
    for what in ("shape", "device", "layout"):
        given, wanted = getattr(target, what), getattr(result, what)
        if given != wanted:
            reject(f"{name}.{what}", given, f"{wanted}, that of the result")
    target.copy_(result)


def _forward(
    rank: int,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    lse: Tensor | None,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis,
    scale: float,
    query_tile: Any = None,
    key_tile: Any = None,
) -> None:
    operands = Operands(query, key, value, None, None, rpb)
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY, *_WHOLE_GRID)
    output, sums = _attend.neighborhood(rank, None, operands, *window, scale)
    _write("out", out, output)
    if lse is not None:
        _write("lse", lse, sums)


def _backward(
    rank: int,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis,
    scale: float,
    query_tile: Any = None,
    key_tile: Any = None,
    num_splits: Any = None,
    compute_delta_with_torch: bool = False,
) -> None:
    operands = Operands(query, key, value)
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY, *_WHOLE_GRID)
    problem = normalize(operands.describe(), rank, *window, scale)
    settings = problem.flat_axes, problem.scale, _dispatch.backend_in_force()
    computed = BACKWARD(*operands, out, lse, d_out, None, *settings)
    written = {"d_query": d_query, "d_key": d_key, "d_value": d_value}
    for (name, target), gradient in zip(written.items(), computed, strict=False):
        _write(name, target, gradient)


def _axes(
    normalizer: Callable[..., Problem], operands: QkOperands | AvOperands, *arguments: Any
) -> tuple[int, ...]:
    return normalizer(describe(operands), *arguments).flat_axes


def _qk_forward(
    rank: int,
    attn: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis = False,
) -> None:
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY)
    _write("attn", attn, _attend.qk(rank, None, QkOperands(query, key, rpb=bias), *window))


def _qk_backward(
    rank: int,
    d_query: Tensor,
    d_key: Tensor,
    d_bias: Tensor | None,
    d_attn: Tensor,
    query: Tensor,
    key: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis = False,
) -> None:
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY)
    axes = _axes(normalize_qk, QkOperands(query, key), rank, *window)
    backend = _dispatch.backend_in_force()
    _write("d_query", d_query, AV(d_attn, key, axes, backend))
    _write("d_key", d_key, AV_TRANSPOSED(d_attn, query, axes, key.shape[1], backend))
    if d_bias is not None:
        _write("d_bias", d_bias, RPB_GRADIENT(d_attn, axes, backend))


def _av_forward(
    rank: int,
    out: Tensor,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis = False,
) -> None:
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY)
    _write("out", out, _attend.av(rank, None, AvOperands(attn, value), *window))


def _av_backward(
    rank: int,
    d_attn: Tensor,
    d_value: Tensor,
    d_out: Tensor,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    is_causal: BoolPerAxis = False,
) -> None:
    window = (kernel_size, 1, dilation, is_causal, *_BOUNDARY)
    axes = _axes(normalize_av, AvOperands(attn, value), rank, *window)
    backend = _dispatch.backend_in_force()
    _write("d_attn", d_attn, QK(d_out, value, None, axes, 0.0, backend))
    _write("d_value", d_value, AV_TRANSPOSED(attn, d_out, axes, value.shape[1], backend))


na1d_forward, na2d_forward, na3d_forward = (partial(_forward, rank) for rank in (1, 2, 3))
na1d_backward, na2d_backward, na3d_backward = (partial(_backward, rank) for rank in (1, 2, 3))
na1d_qk_forward, na2d_qk_forward, na3d_qk_forward = (partial(_qk_forward, n) for n in (1, 2, 3))
na1d_qk_backward, na2d_qk_backward, na3d_qk_backward = (partial(_qk_backward, n) for n in (1, 2, 3))
na1d_av_forward, na2d_av_forward, na3d_av_forward = (partial(_av_forward, n) for n in (1, 2, 3))
na1d_av_backward, na2d_av_backward, na3d_av_backward = (partial(_av_backward, n) for n in (1, 2, 3))

get_tiled_na, set_tiled_na = is_tiled_na_enabled, use_tiled_na
get_gemm_na, set_gemm_na = is_gemm_na_enabled, use_gemm_na
get_gemm_tf32, set_gemm_tf32 = is_tf32_in_gemm_na_enabled, use_tf32_in_gemm_na
