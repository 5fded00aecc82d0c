# SPDX-License-Identifier: MIT
"""The ops ``natten::qk``, ``natten::av``, ``natten::av_transposed`` and ``natten::rpb_gradient``.

Each is linear in every tensor it takes, and its derivatives are calls of the others: that is all there is to gradients
of any order and to forward mode. What they compute is told, and defined, in `_reference_unfused`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from natten import _C, _reference_unfused
from natten._autocast import without_autocast
from natten._axes import AXIS_INTS
from natten._custom_op import Folding, count_flops, define, transform
from natten._launch import Launch
from natten._ops import _ABSENT, _resolve, _run, attended_pairs, launch
from natten._signature import check, lse_dtype

_KERNEL_SIZE = _C.AXIS_FIELDS.index("kernel_size")
_KEY_EXTENT = _C.AXIS_FIELDS.index("key_extent")

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
    query: Tensor, key: Tensor, rpb: Tensor | None, axes: list[int], is_masked: bool, backend: str
) -> Tensor:
    backend = _resolve(backend, query)
    tensors = query, key, rpb
    unused = -math.inf if is_masked else 0.0
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


# Ops ----------------------------------------------------------------------------------------------------------------

# Slots without a key hold -inf if is_masked, else 0; a float could not be -inf in what is compiled ahead of time.
QK: Any = define(
    "qk(Tensor query, Tensor key, Tensor? rpb, SymInt[] axes, bool is_masked, str backend) -> Tensor",
    _qk,
    _qk_fake,
)
AV: Any = define(
    "av(Tensor weights, Tensor value, SymInt[] axes, str backend) -> Tensor", _av, _av_fake
)
AV_TRANSPOSED: Any = define(
    "av_transposed(Tensor weights, Tensor x, SymInt[] axes, SymInt heads_kv, str backend) -> Tensor",
    _av_transposed,
    _av_transposed_fake,
)
RPB_GRADIENT: Any = define(
    "rpb_gradient(Tensor weights, SymInt[] axes, str backend) -> Tensor",
    _rpb_gradient,
    _rpb_gradient_fake,
)


# Derivatives --------------------------------------------------------------------------------------------------------


class _Bilinear:
    """An op of two tensors, linear in each, and of settings: both tensors are kept, and no zeros made up."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.settings = inputs[2:]


def _total(*parts: Tensor | None) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None


class _Qk(_Bilinear):
    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (d_weights,) = cotangents
        (query, key), (rpb, axes, _, backend) = saved, ctx.settings
        wants_query, wants_key, wants_rpb = ctx.needs_input_grad[:3]
        d_query = d_key = d_rpb = None
        if d_weights is not None:
            if wants_query:
                d_query = AV(d_weights, key, axes, backend)
            if wants_key:
                d_key = AV_TRANSPOSED(d_weights, query, axes, key.shape[1], backend)
            if wants_rpb:
                d_rpb = RPB_GRADIENT(d_weights, axes, backend).to(rpb)
        return d_query, d_key, d_rpb, None, None, None

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> Tensor | None:
        (query, key), (_, axes, _, backend) = saved, ctx.settings
        t_query, t_key, t_rpb = tangents[:3]
        by_query = by_key = None
        if t_query is not None or t_rpb is not None:
            moved = query.new_zeros(()).expand_as(query) if t_query is None else t_query
            by_query = QK(moved, key, t_rpb, axes, False, backend)
        if t_key is not None:
            by_key = QK(query, t_key, None, axes, False, backend)
        return _total(by_query, by_key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Bilinear.setup_context(ctx, inputs, output)
        rpb, *settings = ctx.settings
        ctx.settings = None if rpb is None else rpb.dtype, *settings


class _Av(_Bilinear):
    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (d_output,) = cotangents
        (weights, value), (axes, backend) = saved, ctx.settings
        d_weights = d_value = None
        if d_output is not None:
            if ctx.needs_input_grad[0]:
                d_weights = QK(d_output, value, None, axes, False, backend)
            if ctx.needs_input_grad[1]:
                d_value = AV_TRANSPOSED(weights, d_output, axes, value.shape[1], backend)
        return d_weights, d_value, None, None

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> Tensor | None:
        (weights, value), (t_weights, t_value, *_) = saved, tangents
        return _total(
            None if t_weights is None else AV(t_weights, value, *ctx.settings),
            None if t_value is None else AV(weights, t_value, *ctx.settings),
        )


class _AvTransposed(_Bilinear):
    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (d_output,) = cotangents
        (weights, x), (axes, _, backend) = saved, ctx.settings
        d_weights = d_x = None
        if d_output is not None:
            if ctx.needs_input_grad[0]:
                d_weights = QK(x, d_output, None, axes, False, backend)
            if ctx.needs_input_grad[1]:
                d_x = AV(weights, d_output, axes, backend)
        return d_weights, d_x, None, None, None

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> Tensor | None:
        (weights, x), (t_weights, t_x, *_) = saved, tangents
        return _total(
            None if t_weights is None else AV_TRANSPOSED(t_weights, x, *ctx.settings),
            None if t_x is None else AV_TRANSPOSED(weights, t_x, *ctx.settings),
        )


class _RpbGradient:
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, *ctx.settings = inputs
        ctx.shape, ctx.dtype = weights.shape, weights.dtype

    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (table,) = cotangents
        assert table is not None  # it is the only result
        # Every weight gets the entry of its relative position: that is qk of nothing but a bias.
        axes, backend = ctx.settings
        batch, heads, *grid, _ = ctx.shape
        zero = table.new_zeros((), dtype=ctx.dtype)
        query = zero.expand(batch, heads, *grid, 1)
        key = zero.expand(batch, heads, *_per_axis(axes, _KEY_EXTENT), 1)
        return QK(query, key, table, axes, False, backend), None, None

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> Tensor:
        t_weights, *_ = tangents
        gradient: Tensor = RPB_GRADIENT(t_weights, *ctx.settings)
        return gradient


# vmap's dim goes into the batch, or into the heads where the batch shares a bias table.


def _folding_of_qk(*arguments: Any) -> Folding:
    into = 0 if arguments[2] is None else 1
    return Folding((into, into, 0), (into,))


def _into_batch(*_: Any) -> Folding:
    return Folding((0, 0), (0,))


transform(QK, _Qk, _folding_of_qk)
transform(AV, _Av, _into_batch)
transform(AV_TRANSPOSED, _AvTransposed, _into_batch)
transform(RPB_GRADIENT, _RpbGradient, lambda *_: Folding((1,), (0,)))


# Additional tokens, which every query attends to --------------------------------------------------------------------


@without_autocast
def dense_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """[batch, heads, *grid, n] of rows [batch, heads, *grid, m] and a matrix [batch, heads_kv, m, n] a head."""
    batch, heads, *grid, width = rows.shape
    heads_kv = matrix.shape[1]
    shape = batch, heads_kv, heads // heads_kv * math.prod(grid), width
    return (rows.reshape(shape) @ matrix).reshape(batch, heads, *grid, matrix.shape[-1])


@without_autocast
def dense_transposed(weights: Tensor, x: Tensor, heads_kv: int) -> Tensor:
    """[batch, heads_kv, m, n] of weights [batch, heads, *grid, m] and x [batch, heads, *grid, n]."""
    batch, heads, *grid, _ = x.shape
    shape = batch, heads_kv, heads // heads_kv * math.prod(grid)
    rows, columns = (t.reshape(*shape, t.shape[-1]) for t in (weights, x))
    return rows.mT @ columns


# FLOP counts: 2 for every attended pair and channel; sums of weights count none, as in torch ------------------------


def _flops(row_shape: Any, axes: Any, head_dim: int) -> int:
    batch, heads, *grid, _ = row_shape
    return 2 * batch * heads * attended_pairs(tuple(axes), math.prod(grid), 0) * head_dim  # type: ignore[no-any-return]


count_flops(QK, lambda query, _k, _r, axes, *_: _flops(query, axes, query[-1]))
count_flops(AV, lambda weights, value, axes, *_: _flops(weights, axes, value[-1]))
count_flops(AV_TRANSPOSED, lambda weights, x, axes, *_: _flops(weights, axes, x[-1]))
