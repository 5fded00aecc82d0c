# SPDX-License-Identifier: MIT
"""What the ops become under autograd (any order, forward mode, torch.func) and under vmap. Imported for its effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from natten import reference
from natten._autocast import without_autocast
from natten._ops import BACKWARD, FORWARD, library
from natten._problem import Operands

# The arguments of the ops: 6 operands, for backward also output, lse, d_output and d_lse, then axes, scale, backend and,
# if they are given, tile shapes.
_NUM_OPERANDS = len(Operands._fields)


def _below_autograd(op: Any, arguments: tuple[Any, ...]) -> Any:
    """`op` for the inside of a Function: there, recording is off, but an outer torch.func transform wants it on."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
        return op(*arguments)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output, lse = _below_autograd(FORWARD, arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:_NUM_OPERANDS], output, lse)
        ctx.settings = arguments[_NUM_OPERANDS:]
        return output, lse

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        d_output, d_lse = cotangents
        nothing = (None,) * len(ctx.settings)
        if d_output is None and d_lse is None:
            return (*(None,) * _NUM_OPERANDS, *nothing)
        saved = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(saved[_NUM_OPERANDS])
        gradients = BACKWARD(*saved, d_output, d_lse, *ctx.settings)
        wanted = ctx.needs_input_grad[:_NUM_OPERANDS]
        return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *nothing)


class _Backward(torch.autograd.Function):
    """Second derivatives, by way of the reference, which is differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        gradients = _below_autograd(BACKWARD, arguments)
        operands, rest = _split(arguments)
        _, _, d_output, d_lse, axes, scale, *_ = rest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, d_output, d_lse)
        ctx.settings = tuple(axes), scale
        ctx.num_arguments = len(arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _Backward.differentiate(ctx.saved_tensors, ctx, cotangents)

    @staticmethod
    @without_autocast
    def differentiate(saved: Any, ctx: Any, cotangents: Any) -> Any:
        """Of the saved tensors."""
        present = [i for i, tensor in enumerate(saved) if tensor is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(saved)
            for i, tensor in zip(present, tensors, strict=True):
                full[i] = tensor
            operands, (d_output, d_lse) = _split(full)
            computed = reference.backward(operands, d_output, d_lse, *ctx.settings)
            return tuple(gradient for gradient in computed if gradient is not None)

        at: Any = torch.func.vjp(gradients, *(saved[i] for i in present))
        computed, pullback = at
        given = [cotangents[i] for i in present if i < _NUM_OPERANDS]
        filled = (
            torch.zeros_like(c) if g is None else g for c, g in zip(computed, given, strict=True)
        )
        # Output and LSE are functions of the operands: their share is part of the operands' derivatives.
        results: list[Any] = [None] * ctx.num_arguments
        for i, result in zip(present, pullback(tuple(filled)), strict=True):
            results[i if i < _NUM_OPERANDS else i + 2] = result
        return tuple(results)


def _split(arguments: Sequence[Any]) -> tuple[Operands, Any]:
    return Operands(*arguments[:_NUM_OPERANDS]), arguments[_NUM_OPERANDS:]


def _is_dual(*tensors: Tensor | None) -> bool:
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def _is_recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether reverse mode differentiates an op of these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def _record(function: Any, op: Any, arguments: tuple[Any, ...]) -> Any:
    """Runs `function`, or `op` below autograd if there is nothing to differentiate."""
    if not _is_recorded(arguments):
        with _AutoDispatchBelowAutograd():
            return op(*arguments)
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    # A dispatcher kernel sees one transform at a time, and an ordinary Function is what that one wants.
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)


def _forward_autograd(*arguments: Any) -> Any:
    operands, (axes, scale, *_) = _split(arguments)
    if _is_dual(*operands):
        return reference.forward(operands, tuple(axes), scale)
    return _record(_Forward, FORWARD, arguments)


def _backward_autograd(*arguments: Any) -> Any:
    operands, (_, _, d_output, d_lse, axes, scale, *_) = _split(arguments)
    if _is_dual(*operands, d_output, d_lse):
        computed = reference.backward(operands, d_output, d_lse, tuple(axes), scale)
        return tuple(d_output.new_empty(0) if g is None else g for g in computed)
    return _record(_Backward, BACKWARD, arguments)


library.impl("forward", _forward_autograd, "Autograd")
library.impl("backward", _backward_autograd, "Autograd")


# vmap. The new dim is folded into the batch: for tensors that carry it in front, a view. A bias table is shared by the batch
# and cannot carry it there; with one, the dim is folded into the heads, which bias and its gradient are separate for.


def _fold(tensor: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """`tensor` with dim `dim` (None: the same for all) of size `size` merged into dim `into`."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    into %= tensor.dim() - 1
    return tensor.movedim(0, into).flatten(into, into + 1)


def _unfold(tensor: Tensor, size: int, out_of: int) -> Tensor:
    shape = list(tensor.shape)
    out_of %= len(shape)
    shape[out_of : out_of + 1] = [size, shape[out_of] // size]
    return tensor.reshape(shape).movedim(out_of, 0)


def _fold_dims(has_rpb: bool) -> tuple[int, int]:
    """Where the new dim goes in a tensor with head_dim, and in one without."""
    return (-2, -1) if has_rpb else (0, 0)


def _forward_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    full, row = _fold_dims(arguments[5] is not None)
    into = (full,) * 5 + (0,)
    operands = (
        _fold(tensor, dim, info.batch_size, where)
        for tensor, dim, where in zip(arguments, in_dims, into, strict=False)
    )
    output, lse = FORWARD(*operands, *arguments[_NUM_OPERANDS:])
    return (_unfold(output, info.batch_size, full), _unfold(lse, info.batch_size, row)), (0, 0)


def _backward_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    full, row = _fold_dims(arguments[5] is not None)
    into = (full,) * 5 + (0, full, row, full, row)
    tensors = (
        _fold(tensor, dim, info.batch_size, where)
        for tensor, dim, where in zip(arguments, in_dims, into, strict=False)
    )
    gradients = BACKWARD(*tensors, *arguments[len(into) :])
    unfolded, out_dims = [], []
    for gradient, operand, where in zip(gradients, arguments, into, strict=False):
        # An absent operand's gradient has nothing to unfold.
        unfolded.append(gradient if operand is None else _unfold(gradient, info.batch_size, where))
        out_dims.append(None if operand is None else 0)
    return tuple(unfolded), tuple(out_dims)


torch.library.register_vmap("natten::forward", _forward_vmap, lib=library)
torch.library.register_vmap("natten::backward", _backward_vmap, lib=library)
