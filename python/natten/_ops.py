# SPDX-License-Identifier: MIT
"""The ops ``natten::forward`` and ``natten::backward``: the last place that knows torch.

Schema, CPU kernels, shapes for tracing, gradients of any order, forward-mode differentiation, vmap and FLOP counts.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd  # type: ignore[attr-defined]
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from natten import _C, _dispatch, reference

Operands: TypeAlias = (
    "tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]"  # query ... rpb
)
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb"
)
_SETTINGS = "SymInt[] axes, float scale, str backend"
_GRADIENTS = ", ".join(["Tensor"] * 6)

_library = torch.library.Library("natten", "DEF")
_library.define(
    f"forward({_OPERANDS}, {_SETTINGS}) -> (Tensor output, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"backward({_OPERANDS}, Tensor output, Tensor lse, Tensor d_output, Tensor? d_lse, {_SETTINGS}) -> ({_GRADIENTS})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_FORWARD = torch.ops.natten.forward.default
_BACKWARD = torch.ops.natten.backward.default


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of LSE and of the bias table, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(operands: Operands, axes: tuple[int, ...], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Output and LSE of a problem, by the compiled core or by the reference."""
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*operands))  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
    ):
        return _FORWARD(*operands, axes, scale, backend)  # type: ignore[no-any-return]
    # Nothing to differentiate: past the autograd kernel, which costs 5 us.
    with _AutoDispatchBelowAutograd():
        return _FORWARD(*operands, axes, scale, backend)  # type: ignore[no-any-return]


# Kernels ------------------------------------------------------------------------------------------------------------

_ABSENT: _C.Tensor = (0, 0, (0,), 0)


def _readable(tensor: Tensor) -> Tensor:
    """`tensor` with a contiguous last dim, which is all that the core asks for."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _ref(tensor: Tensor) -> _C.Tensor:
    stride = tensor.stride()
    return tensor.data_ptr(), stride[0], stride[1:-2], stride[-2]


def _row_ref(tensor: Tensor) -> _C.Tensor:
    """Of a tensor without head_dim, as LSE is."""
    stride = tensor.stride()
    return tensor.data_ptr(), stride[0], stride[1:-1], stride[-1]


def _kernel(op: str, backend: str, operands: Operands, axes: tuple[int, ...], scale: float) -> tuple[_C.Problem, str]:
    query, key, value, additional_keys, _, rpb = operands
    return _dispatch.kernel_for(
        op,
        backend,
        _dispatch.forced_isa(),
        query.dtype,
        axes,
        query.shape[0],
        query.shape[-2],
        key.shape[-2],
        query.shape[-1],
        value.shape[-1],
        0 if additional_keys is None else additional_keys.shape[1],
        rpb is not None,
        scale,
    )


def _resolve(backend: str, query: Tensor) -> str:
    if backend == _dispatch.IN_FORCE:
        backend = _dispatch.backend_in_force()
    if backend == "reference" or query.device.type == "cpu":
        return backend
    message = f"backend {backend!r} runs on cpu, and the tensors are on {query.device.type}"
    raise NotImplementedError(message)


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    grid = query.shape[:-1]
    return query.new_empty(*grid, value.shape[-1]), query.new_empty(grid, dtype=lse_dtype(query.dtype))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = _resolve(backend, query)
    operands = (query, key, value, additional_keys, additional_values, rpb)
    flat_axes = tuple(axes)
    if backend == "reference":
        return reference.forward(*operands, flat_axes, scale)
    problem, kernel = _kernel("forward", backend, operands, flat_axes, scale)
    output, lse = _empty_output(query, value)
    if lse.numel() == 0:
        return output, lse
    query, key, value = _readable(query), _readable(key), _readable(value)
    more_keys = more_values = _ABSENT
    if additional_keys is not None and additional_values is not None and additional_keys.shape[1] > 0:
        additional_keys, additional_values = _readable(additional_keys), _readable(additional_values)
        more_keys, more_values = _ref(additional_keys), _ref(additional_values)
    if rpb is not None:
        rpb = rpb.to(lse.dtype).contiguous()
    _C.forward(
        problem,
        kernel,
        _ref(query),
        _ref(key),
        _ref(value),
        more_keys,
        more_values,
        0 if rpb is None else rpb.data_ptr(),
        _ref(output),
        _row_ref(lse),
        torch.get_num_threads(),
    )
    return output, lse


def _empty_gradients(operands: Operands) -> Gradients:
    # An op returns tensors only: no numbers stand for "no gradient".
    query, key, value, additional_keys, additional_values, rpb = operands
    absent = query.new_empty(0)

    def like(tensor: Tensor | None) -> Tensor:
        return absent.clone() if tensor is None else tensor.new_empty(tensor.shape)

    return like(query), like(key), like(value), like(additional_keys), like(additional_values), like(rpb)


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    d_lse: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
) -> Gradients:
    backend = _resolve(backend, query)
    operands = (query, key, value, additional_keys, additional_values, rpb)
    flat_axes = tuple(axes)
    gradients = _empty_gradients(operands)
    if backend == "reference":
        computed = reference.backward(*operands, d_output, d_lse, flat_axes, scale)
        for gradient, result in zip(gradients, computed, strict=True):
            if result is not None:
                gradient.copy_(result)
        return gradients
    problem, kernel = _kernel("backward", backend, operands, flat_axes, scale)
    if lse.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    d_query, d_key, d_value, d_additional_keys, d_additional_values, d_rpb = gradients
    query, key, value = _readable(query), _readable(key), _readable(value)
    output, d_output = _readable(output), _readable(d_output)
    more_keys = more_values = d_more_keys = d_more_values = _ABSENT
    if additional_keys is not None and additional_values is not None and additional_keys.shape[1] > 0:
        additional_keys, additional_values = _readable(additional_keys), _readable(additional_values)
        more_keys, more_values = _ref(additional_keys), _ref(additional_values)
        d_more_keys, d_more_values = _ref(d_additional_keys), _ref(d_additional_values)
    kernel_rpb, kernel_d_rpb = rpb, d_rpb
    if rpb is not None:
        kernel_rpb = rpb.to(lse.dtype).contiguous()
        kernel_d_rpb = d_rpb if d_rpb.dtype == lse.dtype else torch.empty_like(kernel_rpb)
    _C.backward(
        problem,
        kernel,
        _ref(query),
        _ref(key),
        _ref(value),
        more_keys,
        more_values,
        0 if kernel_rpb is None else kernel_rpb.data_ptr(),
        _ref(output),
        _row_ref(lse),
        _ref(d_output),
        _ABSENT if d_lse is None else _row_ref(d_lse),
        _ref(d_query),
        _ref(d_key),
        _ref(d_value),
        d_more_keys,
        d_more_values,
        0 if rpb is None else kernel_d_rpb.data_ptr(),
        torch.get_num_threads(),
    )
    if kernel_d_rpb is not d_rpb:
        d_rpb.copy_(kernel_d_rpb)
    return gradients


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")


# Shapes -------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("natten::forward", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value)


@torch.library.register_fake("natten::backward", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    *_: Any,
) -> Gradients:
    return _empty_gradients((query, key, value, additional_keys, additional_values, rpb))


# Gradients ----------------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *operands, axes, scale, backend = arguments
        # Grad mode is off in here, but an outer torch.func transform may want to record what is below.
        with torch.enable_grad(), _AutoDispatchBelowAutograd():
            output, lse = _FORWARD(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, output, lse)
        ctx.settings = axes, scale, backend
        return output, lse

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        d_output, d_lse = cotangents
        if d_output is None and d_lse is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(saved[6])
        gradients = _BACKWARD(*saved, d_output, d_lse, *ctx.settings)
        return (*_wanted(gradients, ctx), None, None, None)


def _wanted(gradients: Gradients, ctx: Any) -> Any:
    needed = ctx.needs_input_grad[:6]
    return (gradient if wants else None for gradient, wants in zip(gradients, needed, strict=True))


class _Backward(torch.autograd.Function):
    """Second derivatives, by way of the reference, which is differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch.enable_grad(), _AutoDispatchBelowAutograd():
            gradients = _BACKWARD(*arguments)
        *operands, _, _, d_output, d_lse, axes, scale, _ = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, d_output, d_lse)
        ctx.settings = tuple(axes), scale
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        saved = ctx.saved_tensors
        present = [i for i, tensor in enumerate(saved) if tensor is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(saved)
            for i, tensor in zip(present, tensors, strict=True):
                full[i] = tensor
            return tuple(g for g in reference.backward(*full, *ctx.settings) if g is not None)

        computed, pullback = torch.func.vjp(gradients, *(saved[i] for i in present))
        wanted = [cotangents[i] for i in present if i < 6]
        filled = tuple(
            torch.zeros_like(c) if w is None else w for c, w in zip(computed, wanted, strict=True)
        )
        results: list[Any] = [None] * 13
        for i, result in zip(present, pullback(filled), strict=True):
            # Output and LSE (6 and 7) are functions of the others: their share is part of the others' derivatives.
            results[i if i < 6 else i + 2] = result
        return tuple(results)


def _is_dual(tensors: tuple[Tensor | None, ...]) -> bool:
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _record(function: Any, arguments: tuple[Any, ...], below: Any) -> Any:
    """Runs `function` if it has something to differentiate, or only what is `below` autograd."""
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):  # type: ignore[attr-defined]
        with _AutoDispatchBelowAutograd():
            return below(*arguments)
    if not torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        return function.apply(*arguments)
    # A dispatcher kernel sees one transform at a time, and an ordinary Function is what that one wants.
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)


def _forward_autograd(*arguments: Any) -> Any:
    *operands, axes, scale, _ = arguments
    if _is_dual(tuple(operands)):
        return reference.forward(*operands, tuple(axes), scale)
    return _record(_Forward, arguments, _FORWARD)


def _backward_autograd(*arguments: Any) -> Any:
    *operands, _, _, d_output, d_lse, axes, scale, _ = arguments
    if _is_dual((*operands, d_output, d_lse)):
        computed = reference.backward(*operands, d_output, d_lse, tuple(axes), scale)
        return tuple(d_output.new_empty(0) if g is None else g for g in computed)
    return _record(_Backward, arguments, _BACKWARD)


_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")


# vmap ---------------------------------------------------------------------------------------------------------------
#
# The new dim is folded into the batch: for tensors that carry it in front, a view. A bias table is shared by the batch
# and cannot carry it there; with one, the dim is folded into the heads, which bias and its gradient are separate for.


def _fold(tensor: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """`tensor` with dim `dim` (None: the same for all) of size `size` merged into dim `into`."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    into %= tensor.dim() - 1
    return tensor.movedim(0, into).flatten(into, into + 1)


def _unfold(tensor: Tensor, size: int, out_of: int) -> Tensor:
    out_of %= tensor.dim()
    return tensor.unflatten(out_of, (size, tensor.shape[out_of] // size)).movedim(out_of, 0)


def _fold_dims(has_rpb: bool) -> tuple[int, int]:
    """Where the new dim goes in a tensor with head_dim, and in one without."""
    return (-2, -1) if has_rpb else (0, 0)


def _fold_all(tensors: tuple[Any, ...], dims: tuple[Any, ...], size: int, into: tuple[int, ...]) -> list[Any]:
    return [_fold(*argument, size, where) for *argument, where in zip(tensors, dims, into, strict=True)]


def _forward_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    size = info.batch_size
    full, row = _fold_dims(arguments[5] is not None)
    operands = _fold_all(arguments[:6], in_dims[:6], size, (full,) * 5 + (0,))
    output, lse = _FORWARD(*operands, *arguments[6:])
    return (_unfold(output, size, full), _unfold(lse, size, row)), (0, 0)


def _backward_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    size = info.batch_size
    full, row = _fold_dims(arguments[5] is not None)
    into = (full,) * 5 + (0, full, row, full, row)
    gradients = _BACKWARD(*_fold_all(arguments[:10], in_dims[:10], size, into), *arguments[10:])
    unfolded = tuple(
        # The bias table has its heads in front; an absent gradient has no dim to unfold.
        gradient
        if argument is None
        else _unfold(gradient, size, 0 if i == 5 else full)
        for i, (gradient, argument) in enumerate(zip(gradients, arguments[:6], strict=True))
    )
    return unfolded, tuple(None if argument is None else 0 for argument in arguments[:6])


torch.library.register_vmap("natten::forward", _forward_vmap, lib=_library)
torch.library.register_vmap("natten::backward", _backward_vmap, lib=_library)


# FLOP counts --------------------------------------------------------------------------------------------------------


def attended_pairs(axes: tuple[int, ...], queries: int, additional_keys: int) -> int:
    """(query, key) pairs of one head of one sample."""
    size = len(_C.AXIS_FIELDS)
    windows = math.prod(_C.attended_pairs(axes[i : i + size]) for i in range(0, len(axes), size))
    return windows + queries * additional_keys


def _flops(q_shape: Any, v_shape: Any, extra_shape: Any, axes: Any, query_products: int, value_products: int) -> int:
    batch, *grid, heads, head_dim = q_shape
    additional = 0 if extra_shape is None else extra_shape[1]
    pairs = attended_pairs(tuple(axes), math.prod(grid), additional)
    return 2 * batch * heads * pairs * (query_products * head_dim + value_products * v_shape[-1])  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.natten.forward)  # type: ignore[untyped-decorator]
def _(
    q_shape: Any, k_shape: Any, v_shape: Any, extra_shape: Any, _v: Any, _r: Any, axes: Any, *_: Any, **__: Any
) -> int:
    return _flops(q_shape, v_shape, extra_shape, axes, 1, 1)


@register_flop_formula(torch.ops.natten.backward)  # type: ignore[untyped-decorator]
def _(
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    extra_shape: Any,
    _v: Any,
    _r: Any,
    _o: Any,
    _l: Any,
    _do: Any,
    _dl: Any,
    axes: Any,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(q_shape, v_shape, extra_shape, axes, 3, 2)
