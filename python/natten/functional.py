# SPDX-License-Identifier: MIT
"""Neighborhood attention as functions.

Neighborhood attention: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023 (arXiv:2204.07143);
dilation: Hassani and Shi, arXiv:2209.15001; fused kernels: Hassani et al., arXiv:2403.04690; stride: Hassani et al.,
"Generalized Neighborhood Attention", arXiv:2504.16922.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten import _attend, _signatures, _varlen
from natten._attend import Explanation
from natten._axes import BoolPerAxis, BoundaryPerAxis, IntPerAxis
from natten._merge import merge_attentions
from natten._problem import Operands
from natten.legacy import (
    FusedNeighborhoodAttention1D,
    FusedNeighborhoodAttention2D,
    FusedNeighborhoodAttention3D,
    na1d_qk_with_bias,
    na2d_qk_with_bias,
    na3d_qk_with_bias,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from natten.types import Backend
from natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "attention",
    "explain",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
]


@_signatures.neighborhood
def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Backend | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    grid: IntPerAxis | None = None,
    query_origin: IntPerAxis | None = None,
    key_origin: IntPerAxis | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a grid of 1, 2 or 3 axes: `na1d`, `na2d` or `na3d`, by the rank of the query.

    Every token attends to a window of tokens around it. Whatever is said per axis may be one value for all axes, or
    a tuple or list with one value per axis.

    Args:
        query: ``[batch, *grid, heads, head_dim]``: float64, float32, bfloat16 or float16. Any strides; a last dim
            that is not contiguous costs a copy of that tensor.
        key: ``[batch, *grid, heads_kv, head_dim]``, of the query's type; heads_kv divides heads.
        value: ``[batch, *grid, heads_kv, head_dim_value]``, of the query's type.
        kernel_size: Tokens in the window, per axis. Even ones have one more token before the query than behind it.
            -1: the whole axis.
        stride: Per axis, 1 to kernel_size: that many consecutive queries share the window of the one in their middle.
            With stride == kernel_size, attention is blocked (windowed). None means 1.
        dilation: Tokens of a window are so far apart, per axis. None means 1.
        is_causal: Whether a query attends to no token behind it, per axis. None means False.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        additional_keys: ``[batch, tokens, heads_kv, head_dim]``: tokens that every query attends to, beside its
            window and in the same softmax (registers, text).
        additional_values: ``[batch, tokens, heads_kv, head_dim_value]``.
        attention_kwargs: Accepted for compatibility, without effect.
        backend: ``"auto"``, ``"fna"``, ``"naive"``, ``"flex"`` or ``"reference"``; None: that of `use_backend`.
        q_tile_shape: Tokens per axis of a tile of queries, in the fused kernels for GPUs; their product must be what
            the kernel is compiled for. None, the best choice in all but rare cases: by cost, for the problem at hand.
            Without effect on CPUs and in other backends.
        kv_tile_shape: The same of a tile of keys.
        backward_q_tile_shape: The same in the backward pass.
        backward_kv_tile_shape: The same of a tile of keys.
        backward_kv_splits: Accepted for compatibility, without effect, as are the next four.
        backward_use_pt_reduction: Without effect.
        run_persistent_kernel: Without effect.
        kernel_schedule: Without effect.
        torch_compile: Without effect.
        return_lse: Whether to return the logarithm of the softmax denominators, too.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``, added to the scaled logits: the entry of
            key minus query position, plus kernel_size - 1, per axis; positions in steps of the dilation. Trainable.
        boundary: What happens at the ends of an axis. ``"shift"``: the window moves inwards, so that every token
            attends to kernel_size tokens. ``"mask"``: it is cut off. ``"zeros"``: it is cut off, and every missing
            token counts as one with logit 0 and value 0. ``"valid"``: only tokens with a whole window are queries;
            the output has ``extent - (kernel_size - 1) * dilation`` tokens on that axis.
        offset: Where the runs of `stride` queries begin, per axis: 0 to stride - 1.
        grid: Extents of the whole grid, if query or key and value hold only a box of it. Windows are those of the
            whole grid; the keys must hold all windows of the queries that are there.
        query_origin: The first token of the query's box, per axis; None: the box is the grid.
        key_origin: The first token of the box of key and value, per axis; None: the box is the grid.

    Returns:
        The output ``[batch, *grid, heads, head_dim_value]``, in the query's type and contiguous; with return_lse, a
        tuple of it and of the LSE ``[batch, *grid, heads]``: natural logarithm, float32 (float64 for float64).
        A query without any key gets 0, and an LSE of -inf.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem, with the reasons; for sparse and nested tensors.

    Example:
        >>> import torch
        >>> from natten.functional import neighborhood_attention_generic
        >>> query = key = value = torch.randn(1, 8, 8, 4, 32)
        >>> neighborhood_attention_generic(query, key, value, kernel_size=(3, 5)).shape
        torch.Size([1, 8, 8, 4, 32])
    """
    output, lse = _attend.neighborhood(
        None,
        backend,
        Operands(query, key, value, additional_keys, additional_values, rpb),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
        grid,
        query_origin,
        key_origin,
        scale,
        tile_shapes=(q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape),
    )
    return (output, lse) if return_lse else output


@_signatures.neighborhood
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Backend | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    grid: IntPerAxis | None = None,
    query_origin: IntPerAxis | None = None,
    key_origin: IntPerAxis | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a sequence.

    All other arguments, and all that is raised, as in `neighborhood_attention_generic`.

    Args:
        query: ``[batch, length, heads, head_dim]``, in float64, float32, bfloat16 or float16.
        key: ``[batch, length, heads_kv, head_dim]``, of the query's type; heads_kv divides heads.
        value: ``[batch, length, heads_kv, head_dim_value]``, of the query's type.
        kernel_size: Tokens in the window; -1: the whole axis.
        stride: That many consecutive queries share a window.
        dilation: Distance between the tokens of a window.
        is_causal: Whether queries attend to no later token.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        additional_keys: ``[batch, tokens, heads_kv, head_dim]``, attended by every query.
        additional_values: ``[batch, tokens, heads_kv, head_dim_value]``.
        attention_kwargs: Without effect, as are the split, schedule and compile arguments.
        backend: Name of a backend; None: that of `use_backend`.
        q_tile_shape: Tokens per axis of a tile of queries, on GPUs; None: by cost.
        kv_tile_shape: The same of a tile of keys.
        backward_q_tile_shape: The same in the backward pass.
        backward_kv_tile_shape: The same of a tile of keys.
        backward_kv_splits: Without effect.
        backward_use_pt_reduction: Without effect.
        run_persistent_kernel: Without effect.
        kernel_schedule: Without effect.
        torch_compile: Without effect.
        return_lse: Whether to return the LSE, too.
        rpb: Relative positional bias ``[heads, 2 * kernel_size - 1]``.
        boundary: ``"shift"``, ``"mask"``, ``"zeros"`` or ``"valid"``.
        offset: Where the runs of `stride` queries begin.
        grid: Extents of the whole grid, if the tensors hold boxes of it.
        query_origin: First token of the query's box.
        key_origin: First token of the box of key and value.

    Returns:
        The output ``[batch, length, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[batch, length, heads]``.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem.

    Example:
        >>> import natten, torch
        >>> query = key = value = torch.randn(1, 64, 4, 32)
        >>> natten.na1d(query, key, value, kernel_size=7).shape
        torch.Size([1, 64, 4, 32])
    """
    output, lse = _attend.neighborhood(
        1,
        backend,
        Operands(query, key, value, additional_keys, additional_values, rpb),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
        grid,
        query_origin,
        key_origin,
        scale,
        tile_shapes=(q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape),
    )
    return (output, lse) if return_lse else output


@_signatures.neighborhood
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Backend | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    grid: IntPerAxis | None = None,
    query_origin: IntPerAxis | None = None,
    key_origin: IntPerAxis | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a feature map.

    All other arguments, and all that is raised, as in `neighborhood_attention_generic`.

    Args:
        query: ``[batch, height, width, heads, head_dim]``, in float64, float32, bfloat16 or float16.
        key: ``[batch, height, width, heads_kv, head_dim]``, of the query's type; heads_kv divides heads.
        value: ``[batch, height, width, heads_kv, head_dim_value]``, of the query's type.
        kernel_size: Tokens in the window, one number or one per axis; -1: the whole axis.
        stride: That many consecutive queries share a window.
        dilation: Distance between the tokens of a window.
        is_causal: Whether queries attend to no later token, one flag or one per axis.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        additional_keys: ``[batch, tokens, heads_kv, head_dim]``, attended by every query.
        additional_values: ``[batch, tokens, heads_kv, head_dim_value]``.
        attention_kwargs: Without effect, as are the split, schedule and compile arguments.
        backend: Name of a backend; None: that of `use_backend`.
        q_tile_shape: Tokens per axis of a tile of queries, on GPUs; None: by cost.
        kv_tile_shape: The same of a tile of keys.
        backward_q_tile_shape: The same in the backward pass.
        backward_kv_tile_shape: The same of a tile of keys.
        backward_kv_splits: Without effect.
        backward_use_pt_reduction: Without effect.
        run_persistent_kernel: Without effect.
        kernel_schedule: Without effect.
        torch_compile: Without effect.
        return_lse: Whether to return the LSE, too.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``.
        boundary: ``"shift"``, ``"mask"``, ``"zeros"`` or ``"valid"``.
        offset: Where the runs of `stride` queries begin.
        grid: Extents of the whole grid, if the tensors hold boxes of it.
        query_origin: First token of the query's box.
        key_origin: First token of the box of key and value.

    Returns:
        The output ``[batch, height, width, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[batch, height, width, heads]``.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem.

    Example:
        >>> import natten, torch
        >>> query = key = value = torch.randn(1, 14, 14, 4, 32)
        >>> natten.na2d(query, key, value, kernel_size=(7, 5), dilation=(2, 1)).shape
        torch.Size([1, 14, 14, 4, 32])
    """
    output, lse = _attend.neighborhood(
        2,
        backend,
        Operands(query, key, value, additional_keys, additional_values, rpb),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
        grid,
        query_origin,
        key_origin,
        scale,
        tile_shapes=(q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape),
    )
    return (output, lse) if return_lse else output


@_signatures.neighborhood
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: Backend | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    grid: IntPerAxis | None = None,
    query_origin: IntPerAxis | None = None,
    key_origin: IntPerAxis | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a video or a volume.

    All other arguments, and all that is raised, as in `neighborhood_attention_generic`.

    Args:
        query: ``[batch, depth, height, width, heads, head_dim]``, in float64, float32, bfloat16 or float16.
        key: ``[batch, depth, height, width, heads_kv, head_dim]``, of the query's type; heads_kv divides heads.
        value: ``[batch, depth, height, width, heads_kv, head_dim_value]``, of the query's type.
        kernel_size: Tokens in the window, one number or one per axis; -1: the whole axis.
        stride: That many consecutive queries share a window.
        dilation: Distance between the tokens of a window.
        is_causal: Whether queries attend to no later token, one flag or one per axis.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        additional_keys: ``[batch, tokens, heads_kv, head_dim]``, attended by every query.
        additional_values: ``[batch, tokens, heads_kv, head_dim_value]``.
        attention_kwargs: Without effect, as are the split, schedule and compile arguments.
        backend: Name of a backend; None: that of `use_backend`.
        q_tile_shape: Tokens per axis of a tile of queries, on GPUs; None: by cost.
        kv_tile_shape: The same of a tile of keys.
        backward_q_tile_shape: The same in the backward pass.
        backward_kv_tile_shape: The same of a tile of keys.
        backward_kv_splits: Without effect.
        backward_use_pt_reduction: Without effect.
        run_persistent_kernel: Without effect.
        kernel_schedule: Without effect.
        torch_compile: Without effect.
        return_lse: Whether to return the LSE, too.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``.
        boundary: ``"shift"``, ``"mask"``, ``"zeros"`` or ``"valid"``.
        offset: Where the runs of `stride` queries begin.
        grid: Extents of the whole grid, if the tensors hold boxes of it.
        query_origin: First token of the query's box.
        key_origin: First token of the box of key and value.

    Returns:
        The output ``[batch, depth, height, width, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[batch, depth, height, width, heads]``.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem.

    Example:
        >>> import natten, torch
        >>> query = key = value = torch.randn(1, 4, 8, 8, 2, 16)
        >>> natten.na3d(query, key, value, kernel_size=3, is_causal=(True, False, False)).shape
        torch.Size([1, 4, 8, 8, 2, 16])
    """
    output, lse = _attend.neighborhood(
        3,
        backend,
        Operands(query, key, value, additional_keys, additional_values, rpb),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
        grid,
        query_origin,
        key_origin,
        scale,
        tile_shapes=(q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape),
    )
    return (output, lse) if return_lse else output


@_signatures.dense
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: Backend | None = None,
    q_tile_size: Any = None,
    kv_tile_size: Any = None,
    backward_q_tile_size: Any = None,
    backward_kv_tile_size: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention, by the same kernels.

    Sequences of different lengths are packed one behind the other, with a batch size of 1, and told apart by
    `seqlens_*` or by `cumulative_seqlen_*`; they may be empty.

    Args:
        query: ``[batch, length, heads, head_dim]``: float64, float32, bfloat16 or float16.
        key: ``[batch, length_kv, heads_kv, head_dim]``, of the query's type; heads_kv divides heads.
        value: ``[batch, length_kv, heads_kv, head_dim_value]``, of the query's type.
        is_causal: Whether query i attends to keys 0 to i only, also where the lengths differ.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        seqlens_Q: int32 ``[sequences]``: lengths of the packed queries.
        seqlens_KV: int32 ``[sequences]``: lengths of the packed keys.
        cumulative_seqlen_Q: int32 ``[sequences + 1]``: where they begin and end instead, from 0 to length.
        cumulative_seqlen_KV: int32 ``[sequences + 1]``.
        max_seqlen_Q: Accepted for compatibility; not needed.
        max_seqlen_KV: Accepted for compatibility; not needed.
        backend: Name of a backend; None: that of `use_backend`.
        q_tile_size: Accepted for compatibility, without effect, as are the next eight.
        kv_tile_size: See q_tile_size.
        backward_q_tile_size: See q_tile_size.
        backward_kv_tile_size: See q_tile_size.
        backward_kv_splits: See q_tile_size.
        backward_use_pt_reduction: See q_tile_size.
        run_persistent_kernel: See q_tile_size.
        kernel_schedule: See q_tile_size.
        torch_compile: See q_tile_size.
        return_lse: Whether to return the LSE, too.

    Returns:
        The output ``[batch, length, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[batch, length, heads]``, as in `neighborhood_attention_generic`.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.
        NotImplementedError: If the backend cannot run the problem.

    Example:
        >>> import natten, torch
        >>> query, key = torch.randn(1, 5, 4, 32), torch.randn(1, 9, 2, 32)
        >>> natten.attention(query, key, key).shape
        torch.Size([1, 5, 4, 32])
    """
    output, lse = _varlen.attention(
        query,
        key,
        value,
        is_causal,
        scale,
        backend,
        seqlens_Q,
        seqlens_KV,
        cumulative_seqlen_Q,
        cumulative_seqlen_KV,
    )
    return (output, lse) if return_lse else output


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntPerAxis,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    scale: float | Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: Backend | None = None,
    *,
    op: str = "attention",
    device: str | None = None,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
    grid: IntPerAxis | None = None,
    query_origin: IntPerAxis | None = None,
    key_origin: IntPerAxis | None = None,
) -> Explanation:
    """What `neighborhood_attention_generic` would run for these arguments, and why not something else.

    Nothing is computed. Gradients count as wanted if a tensor requires them and grad mode is on.

    Args:
        query: As in `neighborhood_attention_generic`, as are all others.
        key: See there.
        value: See there.
        kernel_size: See there.
        stride: See there.
        dilation: See there.
        is_causal: See there.
        scale: See there.
        additional_keys: See there.
        additional_values: See there.
        backend: See there.
        op: ``"attention"``, or a half of it, of the same tensors heads first: ``"qk"`` (`na1d_qk` and so on) or ``"av"``.
        device: The device to take the tensors to be on: ``"cpu"``, or an architecture of GPUs such as ``"sm_86"``, also
            one that is not at hand, and whether or not kernels are compiled for it here.
        rpb: See there.
        boundary: See there.
        offset: See there.
        grid: See there.
        query_origin: See there.
        key_origin: See there.

    Returns:
        An object that prints as a list of all candidates, in order of preference, with the reasons against each.

    Raises:
        ValueError: If an argument is wrong or does not fit the others.

    Example:
        >>> import natten, torch
        >>> x = torch.randn(1, 16, 2, 8)
        >>> natten.explain(x, x, x, kernel_size=3, backend="reference").selected.kernel
        'reference'
    """
    return _attend.explain(
        op,
        backend,
        device,
        Operands(query, key, value, additional_keys, additional_values, rpb),
        kernel_size,
        stride,
        dilation,
        is_causal,
        boundary,
        offset,
        grid,
        query_origin,
        key_origin,
        scale,
    )
