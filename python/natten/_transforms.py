# SPDX-License-Identifier: MIT
"""What the fused ops become under autograd (any order, forward mode, torch.func) and under vmap. Imported for its effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natten import _tangents
from natten._custom_op import Folding, transform
from natten._ops import BACKWARD, FORWARD
from natten._problem import Operands

# The arguments of the ops: 6 operands, for backward also output, lse, d_output and d_lse, then axes, scale, backend and
# tile shapes.
_NUM_OPERANDS = len(Operands._fields)
_NUM_GIVEN = _NUM_OPERANDS + 4


class _Forward:
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        operands, ctx.settings = inputs[:_NUM_OPERANDS], inputs[_NUM_OPERANDS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d_output, d_lse = cotangents
        nothing = (None,) * len(ctx.settings)
        if d_output is None and d_lse is None:
            return (*(None,) * _NUM_OPERANDS, *nothing)
        if d_output is None:
            d_output = torch.zeros_like(saved[_NUM_OPERANDS])
        gradients = BACKWARD(*saved, d_output, d_lse, *ctx.settings)
        wanted = ctx.needs_input_grad[:_NUM_OPERANDS]
        return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *nothing)

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        axes, scale, backend, *_ = ctx.settings
        operands = Operands(*saved)
        return _tangents.of_output(operands, tangents[:_NUM_OPERANDS], axes, scale, backend)


class _Backward:
    """Output and LSE are functions of the operands: their share is part of the operands' derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        operands, ctx.settings = inputs[:_NUM_OPERANDS], inputs[_NUM_GIVEN:]
        _, _, d_output, d_lse = inputs[_NUM_OPERANDS:_NUM_GIVEN]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, d_output, d_lse)
        ctx.save_for_forward(*operands, d_output, d_lse)

    @staticmethod
    def backward(
        ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        axes, scale, backend, *_ = ctx.settings
        *given, d_output, d_lse = saved
        operands = Operands(*given)
        tangents = [
            None if operand is None else cotangent
            for operand, cotangent in zip(operands, cotangents, strict=True)
        ]
        results: list[Tensor | None] = [None] * (_NUM_GIVEN + len(ctx.settings))
        if any(tangent is not None for tangent in tangents):
            # The gradients are those of <output, d_output> + <lse, d_lse>, whose second derivatives are symmetric.
            settings = axes, scale, backend
            if any(ctx.needs_input_grad[:_NUM_OPERANDS]):
                results[:_NUM_OPERANDS] = _tangents.of_gradients(
                    operands, tangents, (d_output, d_lse), (None, None), *settings
                )
            if any(ctx.needs_input_grad[_NUM_OPERANDS:_NUM_GIVEN]):
                by_output, by_lse = _tangents.of_output(operands, tangents, *settings)
                results[_NUM_GIVEN - 2] = by_output
                results[_NUM_GIVEN - 1] = None if d_lse is None else by_lse
        return tuple(results)

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        axes, scale, backend, *_ = ctx.settings
        *given, d_output, d_lse = saved
        _, _, t_d_output, t_d_lse = tangents[_NUM_OPERANDS:_NUM_GIVEN]
        changes = _tangents.of_gradients(
            Operands(*given),
            tangents[:_NUM_OPERANDS],
            (d_output, d_lse),
            (t_d_output, t_d_lse),
            axes,
            scale,
            backend,
        )
        # As the op itself, which returns tensors only.
        return tuple(d_output.new_zeros(0) if change is None else change for change in changes)


def _fold_dims(rpb: Tensor | None) -> tuple[int, int]:
    """Where vmap's dim goes in a tensor with head_dim, and in one without.

    Into the batch: for tensors that carry it in front, a view. A bias table is shared by the batch and cannot carry it
    there; with one, it goes into the heads, which bias and its gradient are separate for.
    """
    return (0, 0) if rpb is None else (-2, -1)


def _folding_of_forward(*arguments: Any) -> Folding:
    full, row = _fold_dims(arguments[5])
    return Folding((full,) * 5 + (0,), (full, row))


def _folding_of_backward(*arguments: Any) -> Folding:
    full, row = _fold_dims(arguments[5])
    into = (full,) * 5 + (0,)
    # An absent operand's gradient has nothing to unfold.
    out_of = [
        None if operand is None else where
        for operand, where in zip(arguments[:_NUM_OPERANDS], into, strict=True)
    ]
    return Folding((*into, full, row, full, row), out_of)


transform(FORWARD, _Forward, _folding_of_forward)
transform(BACKWARD, _Backward, _folding_of_backward)
