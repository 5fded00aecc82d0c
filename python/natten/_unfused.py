# SPDX-License-Identifier: MIT
"""The ops ``natten::qk``, ``natten::av``, ``natten::av_transposed`` and ``natten::rpb_gradient``.

Each is linear in every tensor it takes, and its derivatives are calls of the others: that is all there is to gradients
of any order and to forward mode. What they compute is told, and defined, in `_reference_unfused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from natten import _C, _reference_unfused
from natten._axes import AXIS_INTS
from natten._launch import Launch
from natten._ops import _ABSENT, _resolve, _run, attended_pairs, launch, library
from natten._signature import check, lse_dtype
from natten._transforms import (
    _below_autograd,
    _fold,
    _is_dual,
    _is_recorded,
    _record,
    _unfold,
)

_KERNEL_SIZE = _C.AXIS_FIELDS.index("kernel_size")
_KEY_EXTENT = _C.AXIS_FIELDS.index("key_extent")

for _schema in (
    "qk(Tensor query, Tensor key, Tensor? rpb, SymInt[] axes, float unused, str backend)",
    "av(Tensor weights, Tensor value, SymInt[] axes, str backend)",
    "av_transposed(Tensor weights, Tensor x, SymInt[] axes, SymInt heads_kv, str backend)",
    "rpb_gradient(Tensor weights, SymInt[] axes, str backend)",
):
    library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
QK: Any = torch.ops.natten.qk.default
AV: Any = torch.ops.natten.av.default
AV_TRANSPOSED: Any = torch.ops.natten.av_transposed.default
RPB_GRADIENT: Any = torch.ops.natten.rpb_gradient.default


# Kernels ------------------------------------------------------------------------------------------------------------


def _readable(tensor: Tensor) -> tuple[Tensor, _C.Tensor]:
    """`tensor`, heads first, with a contiguous last dim, which is all that the core asks for, and where that is."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    stride = tensor.stride()
    return tensor, (tensor.data_ptr(), stride[0], stride[2:-1], stride[1])


def _compute(
    op: str,
    plan: Launch,
    written: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    weights: Tensor,
    rpb: Tensor | None = None,
    unused: float = 0.0,
) -> Tensor:
    """Writes the one of query, key and weights that the op computes, or else `written`, the bias gradient."""
    problem, kernel, workspace_bytes = plan
    if kernel is None:
        return written.zero_()
    query_ref = key_ref = _ABSENT
    if query is not None:
        query, query_ref = _readable(query)
    if key is not None:
        key, key_ref = _readable(key)
    weights, weights_ref = _readable(weights)
    if rpb is not None:
        rpb = rpb.to(lse_dtype(weights.dtype)).contiguous()
    _run(
        _C.unfused,
        weights,
        workspace_bytes,
        problem,
        op,
        kernel,
        query_ref,
        key_ref,
        weights_ref,
        0 if rpb is None else rpb.data_ptr(),
        written.data_ptr() if op == "rpb_gradient" else 0,
        unused,
    )
    return written


def _qk(
    query: Tensor, key: Tensor, rpb: Tensor | None, axes: list[int], unused: float, backend: str
) -> Tensor:
    backend = _resolve(backend, query)
    tensors = query, key, rpb
    if backend == "reference":
        check("qk", tensors, axes)
        return _reference_unfused.qk(*tensors, tuple(axes), unused)
    plan = launch("qk", backend, tensors, tuple(axes))
    weights = _empty_weights(query, axes)
    return _compute("qk", plan, weights, query, key, weights, rpb, unused)


def _av(weights: Tensor, value: Tensor, axes: list[int], backend: str) -> Tensor:
    backend = _resolve(backend, weights)
    if backend == "reference":
        check("av", (weights, value), axes)
        return _reference_unfused.av(weights, value, tuple(axes))
    plan = launch("av", backend, (weights, value), tuple(axes))
    output = _empty_queries(weights, value)
    return _compute("av", plan, output, output, value, weights)


def _av_transposed(
    weights: Tensor, x: Tensor, axes: list[int], heads_kv: int, backend: str
) -> Tensor:
    backend = _resolve(backend, weights)
    if backend == "reference":
        check("av_transposed", (weights, x), axes, heads_kv=heads_kv)
        return _reference_unfused.av_transposed(weights, x, tuple(axes), heads_kv)
    plan = launch("av_transposed", backend, (weights, x), tuple(axes), heads_kv=heads_kv)
    output = _empty_keys(x, axes, heads_kv)
    return _compute("av_transposed", plan, output, x, output, weights)


def _rpb_gradient(weights: Tensor, axes: list[int], backend: str) -> Tensor:
    backend = _resolve(backend, weights)
    if backend == "reference":
        check("rpb_gradient", (weights,), axes)
        return _reference_unfused.rpb_gradient(weights, tuple(axes))
    plan = launch("rpb_gradient", backend, (weights,), tuple(axes))
    return _compute("rpb_gradient", plan, _empty_table(weights, axes), None, None, weights)


# Shapes -------------------------------------------------------------------------------------------------------------


def _per_axis(axes: Sequence[int], field: int) -> list[int]:
    return [axes[i + field] for i in range(0, len(axes), AXIS_INTS)]


def _empty_weights(query: Tensor, axes: Sequence[int]) -> Tensor:
    return query.new_empty(*query.shape[:-1], math.prod(_per_axis(axes, _KERNEL_SIZE)))


def _empty_queries(weights: Tensor, value: Tensor) -> Tensor:
    return weights.new_empty(*weights.shape[:-1], value.shape[-1])


def _empty_keys(x: Tensor, axes: Sequence[int], heads_kv: int) -> Tensor:
    return x.new_empty(x.shape[0], heads_kv, *_per_axis(axes, _KEY_EXTENT), x.shape[-1])


def _empty_table(weights: Tensor, axes: Sequence[int]) -> Tensor:
    entries = (2 * size - 1 for size in _per_axis(axes, _KERNEL_SIZE))
    return weights.new_empty(weights.shape[1], *entries, dtype=lse_dtype(weights.dtype))


def _qk_fake(query: Tensor, key: Tensor, rpb: Tensor | None, axes: list[int], *_: Any) -> Tensor:
    check("qk", (query, key, rpb), axes)
    return _empty_weights(query, axes)


def _av_fake(weights: Tensor, value: Tensor, axes: list[int], *_: Any) -> Tensor:
    check("av", (weights, value), axes)
    return _empty_queries(weights, value)


def _av_transposed_fake(
    weights: Tensor, x: Tensor, axes: list[int], heads_kv: int, *_: Any
) -> Tensor:
    check("av_transposed", (weights, x), axes, heads_kv=heads_kv)
    return _empty_keys(x, axes, heads_kv)


def _rpb_gradient_fake(weights: Tensor, axes: list[int], *_: Any) -> Tensor:
    check("rpb_gradient", (weights,), axes)
    return _empty_table(weights, axes)


# Derivatives --------------------------------------------------------------------------------------------------------


def _total(*parts: Tensor | None) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


class _Qk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        query, key, rpb, axes, _, backend = arguments
        ctx.save_for_backward(query, key)
        ctx.settings = axes, backend
        ctx.rpb_dtype = None if rpb is None else rpb.dtype
        return _below_autograd(QK, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (d_weights,), (query, key), (axes, backend) = cotangents, ctx.saved_tensors, ctx.settings
        wants_query, wants_key, wants_rpb = ctx.needs_input_grad[:3]
        d_query = d_key = d_rpb = None
        if wants_query:
            d_query = AV(d_weights, key, axes, backend)
        if wants_key:
            d_key = AV_TRANSPOSED(d_weights, query, axes, key.shape[1], backend)
        if wants_rpb:
            d_rpb = RPB_GRADIENT(d_weights, axes, backend).to(ctx.rpb_dtype)
        return d_query, d_key, d_rpb, None, None, None

    @staticmethod
    def tangent(primals: Any, tangents: Any, axes: Any, _: float, backend: str) -> Tensor | None:
        (query, key, _), (t_query, t_key, t_rpb) = primals, tangents
        by_query = by_key = None
        if t_query is not None or t_rpb is not None:
            moved = query.new_zeros(()).expand_as(query) if t_query is None else t_query
            by_query = QK(moved, key, t_rpb, axes, 0.0, backend)
        if t_key is not None:
            by_key = QK(query, t_key, None, axes, 0.0, backend)
        return _total(by_query, by_key)


class _Av(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        weights, value, *ctx.settings = arguments
        ctx.save_for_backward(weights, value)
        return _below_autograd(AV, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (d_output,), (weights, value), (axes, backend) = cotangents, ctx.saved_tensors, ctx.settings
        d_weights = d_value = None
        if ctx.needs_input_grad[0]:
            d_weights = QK(d_output, value, None, axes, 0.0, backend)
        if ctx.needs_input_grad[1]:
            d_value = AV_TRANSPOSED(weights, d_output, axes, value.shape[1], backend)
        return d_weights, d_value, None, None

    @staticmethod
    def tangent(primals: Any, tangents: Any, *settings: Any) -> Tensor | None:
        (weights, value), (t_weights, t_value) = primals, tangents
        return _total(
            None if t_weights is None else AV(t_weights, value, *settings),
            None if t_value is None else AV(weights, t_value, *settings),
        )


class _AvTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        weights, x, ctx.axes, _, ctx.backend = arguments
        ctx.save_for_backward(weights, x)
        return _below_autograd(AV_TRANSPOSED, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (d_output,), (weights, x) = cotangents, ctx.saved_tensors
        d_weights = d_x = None
        if ctx.needs_input_grad[0]:
            d_weights = QK(x, d_output, None, ctx.axes, 0.0, ctx.backend)
        if ctx.needs_input_grad[1]:
            d_x = AV(weights, d_output, ctx.axes, ctx.backend)
        return d_weights, d_x, None, None, None

    @staticmethod
    def tangent(primals: Any, tangents: Any, *settings: Any) -> Tensor | None:
        (weights, x), (t_weights, t_x) = primals, tangents
        return _total(
            None if t_weights is None else AV_TRANSPOSED(t_weights, x, *settings),
            None if t_x is None else AV_TRANSPOSED(weights, t_x, *settings),
        )


class _RpbGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        weights, ctx.axes, ctx.backend = arguments
        ctx.shape, ctx.dtype = weights.shape, weights.dtype
        return _below_autograd(RPB_GRADIENT, arguments)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # Every weight gets the entry of its relative position: that is qk of nothing but a bias.
        (table,) = cotangents
        batch, heads, *grid, _ = ctx.shape
        zero = table.new_zeros((), dtype=ctx.dtype)
        query = zero.expand(batch, heads, *grid, 1)
        key = zero.expand(batch, heads, *_per_axis(ctx.axes, _KEY_EXTENT), 1)
        return QK(query, key, table, ctx.axes, 0.0, ctx.backend), None, None

    @staticmethod
    def tangent(_: Any, tangents: Any, *settings: Any) -> Tensor | None:
        return RPB_GRADIENT(*tangents, *settings)  # type: ignore[no-any-return]


def _differentiable(function: Any, op: Any, tensors: int) -> Callable[..., Any]:
    """The op's kernel under autograd; the first `tensors` arguments are its tensors."""

    def kernel(*arguments: Any) -> Any:
        if not _is_dual(*arguments[:tensors]):
            return _record(function, op, arguments)
        pairs = [
            (None, None) if t is None else forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]
            for t in arguments[:tensors]
        ]
        primals, tangents = zip(*pairs, strict=True)
        # Recorded with its dual tensors, so that gradients have tangents, too; a Function must not see that they are.
        with forward_ad._set_fwd_grad_enabled(not _is_recorded(arguments)):
            output = _record(function, op, arguments)
        tangent = function.tangent(primals, tangents, *arguments[tensors:])
        return forward_ad.make_dual(output, tangent)  # type: ignore[no-untyped-call]

    return kernel


# vmap: the new dim is folded into the batch, or into the heads where the batch shares a bias table ---------------------


def _qk_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    query, key, rpb, *settings = arguments
    size, into = info.batch_size, 0 if rpb is None else 1
    weights = QK(
        _fold(query, in_dims[0], size, into),
        _fold(key, in_dims[1], size, into),
        _fold(rpb, in_dims[2], size, 0),
        *settings,
    )
    return _unfold(weights, size, into), 0


def _av_vmap(info: Any, in_dims: Any, weights: Any, value: Any, *settings: Any) -> Any:
    size = info.batch_size
    output = AV(_fold(weights, in_dims[0], size, 0), _fold(value, in_dims[1], size, 0), *settings)
    return _unfold(output, size, 0), 0


def _av_transposed_vmap(info: Any, in_dims: Any, weights: Any, x: Any, *settings: Any) -> Any:
    size = info.batch_size
    folded = _fold(weights, in_dims[0], size, 0), _fold(x, in_dims[1], size, 0)
    return _unfold(AV_TRANSPOSED(*folded, *settings), size, 0), 0


def _rpb_gradient_vmap(info: Any, in_dims: Any, weights: Any, *settings: Any) -> Any:
    gradient = RPB_GRADIENT(_fold(weights, in_dims[0], info.batch_size, 1), *settings)
    return _unfold(gradient, info.batch_size, 0), 0


for _op, _kernel, _fake, _vmap, _function, _tensors in (
    (QK, _qk, _qk_fake, _qk_vmap, _Qk, 3),
    (AV, _av, _av_fake, _av_vmap, _Av, 2),
    (AV_TRANSPOSED, _av_transposed, _av_transposed_fake, _av_transposed_vmap, _AvTransposed, 2),
    (RPB_GRADIENT, _rpb_gradient, _rpb_gradient_fake, _rpb_gradient_vmap, _RpbGradient, 1),
):
    _name = _op._opname
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    library.impl(_name, _differentiable(_function, _op, _tensors), "Autograd")
    torch.library.register_fake(f"natten::{_name}", _fake, lib=library)
    torch.library.register_vmap(f"natten::{_name}", _vmap, lib=library)


# FLOP counts: 2 for every attended pair and channel; sums of weights count none, as in torch ----------------------------


def _flops(row_shape: Any, axes: Any, head_dim: int) -> int:
    batch, heads, *grid, _ = row_shape
    return 2 * batch * heads * attended_pairs(tuple(axes), math.prod(grid), 0) * head_dim  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.natten.qk)
def _(q_shape: Any, _k: Any, _r: Any, axes: Any, *_: Any, **__: Any) -> int:
    return _flops(q_shape, axes, q_shape[-1])


@register_flop_formula([torch.ops.natten.av, torch.ops.natten.av_transposed])
def _(w_shape: Any, x_shape: Any, axes: Any, *_: Any, **__: Any) -> int:
    return _flops(w_shape, axes, x_shape[-1])
