# SPDX-License-Identifier: MIT
"""Counts of floating point operations: of a call by its shapes, and of a model by fvcore.

What is counted are the products with queries and keys, and with weights and values, of all (query, key) pairs that
attend: two operations for each pair and channel. Causal and cut windows count what they hold. Softmax, scale and bias
count as none. ``torch.utils.flop_counter.FlopCounterMode`` counts the same, by the same formulas, and gradients too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from natten._axes import BoolPerAxis, IntPerAxis, integers
from natten._errors import reject
from natten.functional import neighborhood_attention_generic
from natten.legacy import warn_once
from natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "add_natten_handle",
    "av_flop",
    "fna_flop",
    "fna_flop_count",
    "get_flops",
    "na_av_flop_count",
    "na_qk_flop_count",
    "qk_flop",
]

Shape = Sequence[int]

_QK = (na1d_qk, na2d_qk, na3d_qk)
_AV = (na1d_av, na2d_av, na3d_av)


def _count(function: Callable[..., Any], shapes: Sequence[Shape], return_macs: bool) -> int:
    """What torch's counter says of `function` on tensors that have a shape and no memory."""
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        function(*tensors)
    flops: int = counter.get_total_flops()
    return flops // 2 if return_macs else flops


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not 4 <= len(shape) <= 6:
        reject(name, shape, "the shape of a tensor with 4 to 6 dims")
    sizes = integers(name, shape, len(shape))
    if min(sizes) < 0:
        reject(name, shape, "sizes of at least 0")
    return sizes


def fna_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    is_heads_last: bool = True,
    return_macs: bool = False,
) -> int:
    """Operations of fused neighborhood attention, forward.

    Args:
        q_shape: Shape of the query, ``(batch, *grid, heads, head_dim)``.
        k_shape: Shape of the key.
        v_shape: Shape of the value.
        kernel_size: Tokens in the window, per axis.
        dilation: Their distance, per axis.
        is_causal: Whether queries attend to no later token, per axis.
        is_heads_last: Whether the shapes are those; if not, they are ``(batch, heads, *grid, head_dim)``.
        return_macs: Whether to count a product and the addition that follows it as one.

    Returns:
        The number of operations.

    Raises:
        ValueError: If the arguments are no neighborhood attention.

    Example:
        >>> from natten.flops import fna_flop_count
        >>> shape = (1, 16, 16, 4, 32)
        >>> fna_flop_count(shape, shape, shape, 7, 1, False) == 2 * 2 * 16 * 16 * 4 * 32 * 7 * 7
        True
    """
    shapes = _shape("q_shape", q_shape), _shape("k_shape", k_shape), _shape("v_shape", v_shape)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if not is_heads_last:
            query, key, value = (tensor.movedim(1, -2) for tensor in (query, key, value))
        return neighborhood_attention_generic(
            query, key, value, kernel_size, dilation=dilation, is_causal=is_causal
        )

    return _count(call, shapes, return_macs)


def na_qk_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Operations of `natten.functional.na2d_qk` and its like, without additional keys.

    Args:
        q_shape: Shape of the query, ``(batch, heads, *grid, head_dim)``; with is_heads_last
            ``(batch, *grid, heads, head_dim)``.
        k_shape: Shape of the key.
        kernel_size: Tokens in the window, per axis.
        dilation: Their distance, per axis.
        is_causal: Whether queries attend to no later token, per axis.
        is_heads_last: See q_shape.
        return_macs: See `fna_flop_count`.

    Returns:
        The number of operations.

    Raises:
        ValueError: If the arguments are no neighborhood attention.
    """
    shapes = _shape("q_shape", q_shape), _shape("k_shape", k_shape)
    function = _QK[len(q_shape) - 4]

    def call(query: Tensor, key: Tensor) -> Tensor:
        if is_heads_last:
            query, key = query.movedim(-2, 1), key.movedim(-2, 1)
        return function(query, key, kernel_size, dilation, is_causal=is_causal)

    return _count(call, shapes, return_macs)


def na_av_flop_count(
    a_shape: Shape,
    v_shape: Shape,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    is_heads_last: bool = False,
    return_macs: bool = False,
) -> int:
    """Operations of `natten.functional.na2d_av` and its like, without additional values.

    Args:
        a_shape: Shape of the weights, ``(batch, heads, *grid, prod(kernel_size))``; with is_heads_last
            ``(batch, *grid, heads, prod(kernel_size))``.
        v_shape: Shape of the value.
        kernel_size: Tokens in the window, per axis.
        dilation: Their distance, per axis.
        is_causal: Whether queries attend to no later token, per axis.
        is_heads_last: See a_shape.
        return_macs: See `fna_flop_count`.

    Returns:
        The number of operations.

    Raises:
        ValueError: If the arguments are no neighborhood attention.
    """
    shapes = _shape("a_shape", a_shape), _shape("v_shape", v_shape)
    function = _AV[len(a_shape) - 4]

    def call(attn: Tensor, value: Tensor) -> Tensor:
        if is_heads_last:
            attn, value = attn.movedim(-2, 1), value.movedim(-2, 1)
        return function(attn, value, kernel_size, dilation, is_causal=is_causal)

    return _count(call, shapes, return_macs)


# fvcore, which counts the nodes of a trace ---------------------------------------------------------------------------


def _argument(value: Any) -> Any:
    """A value of a trace: the shape of a tensor, a list of numbers, or a constant."""
    if isinstance(value.type(), torch.TensorType):
        return value.type().sizes()
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [entry.toIValue() for entry in node.inputs()]
    return value.toIValue()


def _macs(op: Any, inputs: list[Any]) -> int:
    """By the formula that torch's counter has, halved: what fvcore calls a FLOP is a multiply-add."""
    flops: int = flop_registry[op](*map(_argument, inputs))
    return flops // 2


def fna_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """The handle, for fvcore, of fused attention. `inputs` and `outputs` are values of a trace, as of the next two."""
    return _macs(torch.ops.natten.forward, inputs)


def qk_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """The handle, for fvcore, of `natten.functional.na2d_qk` and its like."""
    return _macs(torch.ops.natten.qk, inputs)


def av_flop(inputs: list[Any], outputs: list[Any]) -> int:
    """The handle, for fvcore, of `natten.functional.na2d_av` and its like."""
    return _macs(torch.ops.natten.av, inputs)


_HANDLES = {"natten::forward": fna_flop, "natten::qk": qk_flop, "natten::av": av_flop}


def add_natten_handle(flop_ctr: Any) -> Any:
    """Lets an fvcore counter know neighborhood attention. It counts multiply-adds.

    Attention by backend "flex" is no op of this package, and not counted.

    Args:
        flop_ctr: A ``fvcore.nn.FlopCountAnalysis``.

    Returns:
        The same.
    """
    if not hasattr(flop_ctr, "set_op_handle"):
        reject("flop_ctr", type(flop_ctr).__name__, "a fvcore.nn.FlopCountAnalysis")
    return flop_ctr.set_op_handle(**_HANDLES)


def get_flops(model: nn.Module, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-adds of a model's forward pass, by fvcore.

    Args:
        model: The model.
        input: Its input, or a tuple of its inputs.
        disable_warnings: Whether to keep quiet about operations that are not counted.

    Returns:
        Their number.

    Raises:
        ImportError: If fvcore is not there.
    """
    if not isinstance(model, nn.Module):
        reject("model", type(model).__name__, "a torch.nn.Module")
    try:
        fvcore = importlib.import_module("fvcore.nn")
    except ImportError as error:
        message = "natten.flops.get_flops counts with fvcore: pip install fvcore"
        raise ImportError(message) from error
    counter = add_natten_handle(fvcore.FlopCountAnalysis(model, input))
    if disable_warnings:
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
    return int(counter.total())


# What they were called by rank until 0.17.
_OLD_NAMES = {
    **{f"qk_{rank}d_rpb_flop": "qk_flop" for rank in (1, 2, 3)},
    **{f"av_{rank}d_flop": "av_flop" for rank in (1, 2, 3)},
    **{f"fna_{rank}d_flop": "fna_flop" for rank in (1, 2, 3)},
}


if not TYPE_CHECKING:  # which would take it for a promise of every name

    def __getattr__(name: str) -> Any:
        if name in _OLD_NAMES:
            warn_once(f"natten.flops.{name}", f"natten.flops.{_OLD_NAMES[name]}")
            return globals()[_OLD_NAMES[name]]
        message = f"module 'natten.flops' has no attribute {name!r}"
        raise AttributeError(message)
