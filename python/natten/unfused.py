# SPDX-License-Identifier: MIT
"""Neighborhood attention in two halves, with the attention weights in memory between them.

For what must be done to weights: bias, drop, look at, or make them some other way. All else is faster fused, see
`natten.functional.na2d`. Tensors are heads first: ``[batch, heads, *grid, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natten import _attend
from natten._axes import BoolPerAxis, BoundaryPerAxis, IntPerAxis
from natten._errors import reject
from natten._problem import AvOperands, QkOperands
from natten.types import Backend

__all__ = ["na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]


def _of_samples(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """The nested tensor of what `function` makes of each sample of nested tensors: samples may differ in their grids."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_nested for tensor in present):
        reject("some tensors", "nested, some not", "all nested, or none")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        reject("requires_grad", True, "nested tensors without gradients", "use torch.no_grad()")
    count = present[0].size(0)
    if any(tensor.size(0) != count for tensor in present):
        reject("batch sizes", [tensor.size(0) for tensor in present], "one size")
    rows = [[None] * count if tensor is None else tensor.unbind() for tensor in tensors]
    results = [
        function(*(None if sample is None else sample[None] for sample in samples))[0]
        for samples in zip(*rows, strict=True)
    ]
    return _nested(results, present[0])


def _nested(samples: list[Tensor], like: Any) -> Tensor:
    """The nested tensor of samples; where they are as long as those of `like`, one that torch can add to it, say."""
    if like.layout is torch.jagged and like.lengths() is None:
        dim = like._ragged_idx
        if all(
            a.shape[dim - 1] == b.shape[dim - 1]
            for a, b in zip(samples, like.unbind(), strict=True)
        ):
            values = torch.cat(samples, dim - 1)
            return torch.nested.nested_tensor_from_jagged(values, like.offsets(), jagged_dim=dim)
    return torch.nested.as_nested_tensor(samples, layout=like.layout)


def _is_nested(*tensors: Tensor | None) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors)


def _qk(
    rank: int,
    backend: str | None,
    query: Tensor,
    key: Tensor,
    additional_keys: Tensor | None,
    rpb: Tensor | None,
    *arguments: Any,
) -> Tensor:
    def weights(query: Tensor, key: Tensor, additional_keys: Tensor | None) -> Tensor:
        operands = QkOperands(query, key, additional_keys, rpb)
        return _attend.qk(rank, backend, operands, *arguments)

    if _is_nested(rpb):
        reject("rpb", "nested", "a dense tensor", "all samples share it")
    if _is_nested(query, key, additional_keys):
        return _of_samples(weights, query, key, additional_keys)
    return weights(query, key, additional_keys)


def _av(
    rank: int,
    backend: str | None,
    attn: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    *arguments: Any,
) -> Tensor:
    def output(attn: Tensor, value: Tensor, additional_values: Tensor | None) -> Tensor:
        operands = AvOperands(attn, value, additional_values)
        return _attend.av(rank, backend, operands, *arguments)

    if _is_nested(attn, value, additional_values):
        return _of_samples(output, attn, value, additional_values)
    return output(attn, value, additional_values)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Attention weights of a sequence, before the softmax: query times key, unscaled, plus bias.

    Args:
        query: ``[batch, heads, length, head_dim]``, float64, float32, bfloat16 or float16; any strides. All tensors
            may be nested, and their samples differ in size, where no gradient is wanted.
        key: ``[batch, heads_kv, length, head_dim]``, of the query's type; heads_kv divides heads.
        kernel_size: As in `natten.functional.neighborhood_attention_generic`.
        dilation: See there.
        additional_keys: ``[batch, heads_kv, tokens, head_dim]``: tokens that every query attends to. Their weights are
            further columns behind those of the window.
        is_causal: See there.
        rpb: Relative positional bias ``[heads, 2 * kernel_size - 1]``, see there.
        stride: See there.
        boundary: See there. In slots of missing keys, ``"zeros"`` has 0.
        offset: See there.
        backend: ``"auto"``, ``"gemm"``, ``"naive"`` or ``"reference"``; None: that of `natten.use_backend`.

    Returns:
        Weights ``[batch, heads, length, kernel_size]``, plus the number of additional keys, in the query's type.
        Slots without a key (of causal and cut windows: the last ones of an axis) hold -inf, and pass on no gradient.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na1d_av, na1d_qk
        >>> query = key = value = torch.randn(1, 4, 16, 32)
        >>> attn = na1d_qk(query * 32**-0.5, key, kernel_size=3).softmax(-1)
        >>> attn.shape, na1d_av(attn, value, kernel_size=3).shape
        (torch.Size([1, 4, 16, 3]), torch.Size([1, 4, 16, 32]))
    """
    return _qk(
        1,
        backend,
        query,
        key,
        additional_keys,
        rpb,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Sums of the values in each window of a sequence, by weights such as `na1d_qk` and a softmax make.

    Args:
        attn: Weights ``[batch, heads, length, kernel_size]``, plus the number of additional values: as `na1d_qk` lays
            them out, in any type it takes; any strides. What slots without a key hold does not matter.
        value: ``[batch, heads_kv, length, head_dim]``, of attn's type; heads_kv divides heads.
        kernel_size: As in `na1d_qk`, as are all that follow.
        dilation: See there.
        additional_values: ``[batch, heads_kv, tokens, head_dim]``.
        is_causal: See there.
        stride: See there.
        boundary: See there. Missing keys of ``"zeros"`` have value 0.
        offset: See there.
        backend: See there.

    Returns:
        ``[batch, heads, length, head_dim]``, in attn's type.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na1d_av
        >>> attn, value = torch.rand(1, 4, 16, 3), torch.randn(1, 4, 16, 32)
        >>> na1d_av(attn, value, kernel_size=3).shape
        torch.Size([1, 4, 16, 32])
    """
    return _av(
        1,
        backend,
        attn,
        value,
        additional_values,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Attention weights of a feature map, before the softmax: query times key, unscaled, plus bias.

    Args:
        query: ``[batch, heads, height, width, head_dim]``, float64, float32, bfloat16 or float16; any strides. All tensors
            may be nested, and their samples differ in size, where no gradient is wanted.
        key: ``[batch, heads_kv, height, width, head_dim]``, of the query's type; heads_kv divides heads.
        kernel_size: As in `natten.functional.neighborhood_attention_generic`.
        dilation: See there.
        additional_keys: ``[batch, heads_kv, tokens, head_dim]``: tokens that every query attends to. Their weights are
            further columns behind those of the window.
        is_causal: See there.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``, see there.
        stride: See there.
        boundary: See there. In slots of missing keys, ``"zeros"`` has 0.
        offset: See there.
        backend: ``"auto"``, ``"gemm"``, ``"naive"`` or ``"reference"``; None: that of `natten.use_backend`.

    Returns:
        Weights ``[batch, heads, height, width, prod(kernel_size)]``, plus the number of additional keys, in the query's type; the window row-major.
        Slots without a key (of causal and cut windows: the last ones of an axis) hold -inf, and pass on no gradient.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na2d_av, na2d_qk
        >>> query = key = value = torch.randn(1, 4, 8, 8, 32)
        >>> attn = na2d_qk(query * 32**-0.5, key, kernel_size=3).softmax(-1)
        >>> attn.shape, na2d_av(attn, value, kernel_size=3).shape
        (torch.Size([1, 4, 8, 8, 9]), torch.Size([1, 4, 8, 8, 32]))
    """
    return _qk(
        2,
        backend,
        query,
        key,
        additional_keys,
        rpb,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Sums of the values in each window of a feature map, by weights such as `na2d_qk` and a softmax make.

    Args:
        attn: Weights ``[batch, heads, height, width, prod(kernel_size)]``, plus the number of additional values: as `na2d_qk` lays
            them out, in any type it takes; any strides. What slots without a key hold does not matter.
        value: ``[batch, heads_kv, height, width, head_dim]``, of attn's type; heads_kv divides heads.
        kernel_size: As in `na2d_qk`, as are all that follow.
        dilation: See there.
        additional_values: ``[batch, heads_kv, tokens, head_dim]``.
        is_causal: See there.
        stride: See there.
        boundary: See there. Missing keys of ``"zeros"`` have value 0.
        offset: See there.
        backend: See there.

    Returns:
        ``[batch, heads, height, width, head_dim]``, in attn's type.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na2d_av
        >>> attn, value = torch.rand(1, 4, 8, 8, 9), torch.randn(1, 4, 8, 8, 32)
        >>> na2d_av(attn, value, kernel_size=3).shape
        torch.Size([1, 4, 8, 8, 32])
    """
    return _av(
        2,
        backend,
        attn,
        value,
        additional_values,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    rpb: Tensor | None = None,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Attention weights of a volume, before the softmax: query times key, unscaled, plus bias.

    Args:
        query: ``[batch, heads, depth, height, width, head_dim]``, float64, float32, bfloat16 or float16; any strides. All tensors
            may be nested, and their samples differ in size, where no gradient is wanted.
        key: ``[batch, heads_kv, depth, height, width, head_dim]``, of the query's type; heads_kv divides heads.
        kernel_size: As in `natten.functional.neighborhood_attention_generic`.
        dilation: See there.
        additional_keys: ``[batch, heads_kv, tokens, head_dim]``: tokens that every query attends to. Their weights are
            further columns behind those of the window.
        is_causal: See there.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``, see there.
        stride: See there.
        boundary: See there. In slots of missing keys, ``"zeros"`` has 0.
        offset: See there.
        backend: ``"auto"``, ``"gemm"``, ``"naive"`` or ``"reference"``; None: that of `natten.use_backend`.

    Returns:
        Weights ``[batch, heads, depth, height, width, prod(kernel_size)]``, plus the number of additional keys, in the query's type; the window row-major.
        Slots without a key (of causal and cut windows: the last ones of an axis) hold -inf, and pass on no gradient.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na3d_av, na3d_qk
        >>> query = key = value = torch.randn(1, 4, 4, 8, 8, 32)
        >>> attn = na3d_qk(query * 32**-0.5, key, kernel_size=3).softmax(-1)
        >>> attn.shape, na3d_av(attn, value, kernel_size=3).shape
        (torch.Size([1, 4, 4, 8, 8, 27]), torch.Size([1, 4, 4, 8, 8, 32]))
    """
    return _qk(
        3,
        backend,
        query,
        key,
        additional_keys,
        rpb,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolPerAxis | None = False,
    *,
    stride: IntPerAxis | None = 1,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Sums of the values in each window of a volume, by weights such as `na3d_qk` and a softmax make.

    Args:
        attn: Weights ``[batch, heads, depth, height, width, prod(kernel_size)]``, plus the number of additional values: as `na3d_qk` lays
            them out, in any type it takes; any strides. What slots without a key hold does not matter.
        value: ``[batch, heads_kv, depth, height, width, head_dim]``, of attn's type; heads_kv divides heads.
        kernel_size: As in `na3d_qk`, as are all that follow.
        dilation: See there.
        additional_values: ``[batch, heads_kv, tokens, head_dim]``.
        is_causal: See there.
        stride: See there.
        boundary: See there. Missing keys of ``"zeros"`` have value 0.
        offset: See there.
        backend: See there.

    Returns:
        ``[batch, heads, depth, height, width, head_dim]``, in attn's type.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons.

    Example:
        >>> import torch
        >>> from natten.functional import na3d_av
        >>> attn, value = torch.rand(1, 4, 4, 8, 8, 27), torch.randn(1, 4, 4, 8, 8, 32)
        >>> na3d_av(attn, value, kernel_size=3).shape
        torch.Size([1, 4, 4, 8, 8, 32])
    """
    return _av(
        3,
        backend,
        attn,
        value,
        additional_values,
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
    )
