# SPDX-License-Identifier: MIT
"""Neighborhood attention of several grids of different extents, packed one behind the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from natten import _attend
from natten._axes import BoolPerAxis, IntPerAxis
from natten._errors import reject
from natten._problem import Operands
from natten._varlen import check_packed
from natten.types import Backend

__all__ = ["Layout", "configure_varlen", "neighborhood_attention_varlen"]


class Layout(NamedTuple):
    """One of the grids.

    Attributes:
        extents: Tokens per axis.
        kernel_size: Tokens in its windows.
        stride: How many consecutive queries share a window.
        dilation: Distance between the tokens of a window.
    """

    extents: tuple[int, ...]
    kernel_size: IntPerAxis
    stride: IntPerAxis
    dilation: IntPerAxis


class Metadata(NamedTuple):
    """What `configure_varlen` returns: the grids, and what they have in common."""

    layouts: tuple[Layout, ...]
    is_causal: BoolPerAxis
    backend: Backend | None


def configure_varlen(
    token_layout_list: Sequence[tuple[int, ...]],
    head_dim: int | None = None,
    device: Any = None,
    dtype: Any = None,
    requires_grad: bool = False,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    backend: Backend | None = None,
    **settings: Any,
) -> Metadata:
    """What `neighborhood_attention_varlen` takes as ``metadata``, made once for many calls.

    Args:
        token_layout_list: The extents of each grid; all of the same rank.
        head_dim: Accepted for compatibility, without effect, as are the next three and `settings`.
        device: See head_dim.
        dtype: See head_dim.
        requires_grad: See head_dim.
        kernel_size: Tokens in the window, for grids that kernel_size_list says nothing about.
        stride: How many consecutive queries share a window, likewise.
        dilation: Distance between the tokens of a window, likewise.
        is_causal: Whether queries attend to no later token, per axis; the same for all grids.
        kernel_size_list: One kernel size per grid.
        stride_list: One stride per grid.
        dilation_list: One dilation per grid.
        backend: Name of a backend; None: that of `use_backend`.
        **settings: Tile shapes and schedules of another package's kernels, without effect.

    Returns:
        The grids, for any number of calls.

    Raises:
        ValueError: If there is no grid, or lists are of different lengths.
    """
    if not isinstance(token_layout_list, Sequence) or not token_layout_list:
        reject("token_layout_list", token_layout_list, "the extents of at least one grid")
    layouts = [tuple(extents) for extents in token_layout_list]
    if len({len(extents) for extents in layouts}) != 1 or not 1 <= len(layouts[0]) <= 3:
        reject("token_layout_list", layouts, "grids of 1 to 3 axes, all of the same rank")

    def each(name: str, one: IntPerAxis, many: Sequence[IntPerAxis] | None) -> Any:
        if many is not None and len(many) != len(layouts):
            reject(f"len({name}_list)", len(many), f"{len(layouts)}, the number of grids")
        return [one] * len(layouts) if many is None else many

    kernel_sizes = each("kernel_size", kernel_size, kernel_size_list)
    strides = each("stride", stride, stride_list)
    dilations = each("dilation", dilation, dilation_list)
    grids = zip(layouts, kernel_sizes, strides, dilations, strict=True)
    return Metadata(tuple(Layout(*grid) for grid in grids), is_causal, backend)


@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: Metadata | None = None,
    token_layout_list: Sequence[tuple[int, ...]] | None = None,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
    return_lse: Literal[False] = False,
    **settings: Any,
) -> Tensor: ...


@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: Metadata | None = None,
    token_layout_list: Sequence[tuple[int, ...]] | None = None,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
    *,
    return_lse: Literal[True],
    **settings: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: Metadata | None = None,
    token_layout_list: Sequence[tuple[int, ...]] | None = None,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
    *,
    return_lse: bool,
    **settings: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: Metadata | None = None,
    token_layout_list: Sequence[tuple[int, ...]] | None = None,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis = 1,
    dilation: IntPerAxis = 1,
    is_causal: BoolPerAxis = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
    return_lse: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention within each of several grids. One call of the kernels per grid.

    Args:
        query: ``[1, tokens, heads, head_dim]``: the tokens of all grids, the first grid's first, each in row-major order.
        key: ``[1, tokens, heads_kv, head_dim]``.
        value: ``[1, tokens, heads_kv, head_dim_value]``.
        metadata: What `configure_varlen` returns; then the next eight arguments say nothing.
        token_layout_list: The extents of each grid.
        kernel_size: As of `configure_varlen`, as are the next six.
        stride: See there.
        dilation: See there.
        is_causal: See there.
        kernel_size_list: See there.
        stride_list: See there.
        dilation_list: See there.
        scale: Factor of the logits. None means ``head_dim ** -0.5``.
        backend: Name of a backend; None: that of the metadata, or of `use_backend`.
        return_lse: Whether to return the LSE, too.
        **settings: Tile shapes and schedules of another package's kernels, without effect.

    Returns:
        The output ``[1, tokens, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[1, tokens, heads]``.

    Raises:
        ValueError: If an argument is wrong, or the grids do not hold all tokens.

    Example:
        >>> import torch
        >>> from natten.varlen import neighborhood_attention_varlen
        >>> x = torch.randn(1, 4 * 5 + 6 * 3, 2, 8)
        >>> neighborhood_attention_varlen(x, x, x, token_layout_list=[(4, 5), (6, 3)], kernel_size=3).shape
        torch.Size([1, 38, 2, 8])
    """
    if metadata is None:
        metadata = configure_varlen(
            token_layout_list or (),
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            kernel_size_list=kernel_size_list,
            stride_list=stride_list,
            dilation_list=dilation_list,
        )
    counts = [math.prod(layout.extents) for layout in metadata.layouts]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_packed(name, tensor)
        if tensor.shape[1] != sum(counts):
            reject(f"{name}.shape[1]", tensor.shape[1], f"{sum(counts)}, the tokens of all grids")
    outputs, lses = [], []
    parts = (torch.split(tensor, counts, dim=1) for tensor in (query, key, value))
    for layout, *tensors in zip(metadata.layouts, *parts, strict=True):
        boxes = (tensor.unflatten(1, layout.extents) for tensor in tensors)
        output, lse = _attend.neighborhood(
            len(layout.extents),
            backend or metadata.backend,
            Operands(*boxes),
            *layout[1:],
            metadata.is_causal,
            "shift",
            0,
            None,
            None,
            None,
            scale,
        )
        outputs.append(output.flatten(1, -3))
        lses.append(lse.flatten(1, -2))
    if return_lse:
        return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)
    return torch.cat(outputs, dim=1)
