# SPDX-License-Identifier: MIT
"""How an op is made known to torch: schema, kernel, shapes, FLOPs, derivatives and vmap, the same way for every op.

All of it is public API but for one thing. Neither forward mode nor reverse mode under torch.func can be registered for an
op: `torch.library.register_autograd` knows reverse mode outside of torch.func only. So an op's kernel for autograd is a
`torch.autograd.Function`, of the kind that torch itself makes for each level of a torch.func transform.

This is the private API of torch that the package stands on. Each version of torch that is supported is tried with it, and
one that lacks any of it fails where it is imported or first used, not in silence:

- for derivatives, `_AutoDispatchBelowAutograd`, `_SingleLevelFunction`, `enable_single_level_autograd_function` and
  `_set_fwd_grad_enabled`, which torch's own Functions under torch.func are made with;
- to see what a call is under, `_are_functorch_transforms_active`, `_current_level` (of forward mode),
  `_len_torch_dispatch_stack`, `_get_tracing_state` and `_set_tracing_state`;
- to see it faster than by public API, in each call, `_any_requires_grad` and `_is_any_autocast_enabled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

library: Any = torch.library.Library("natten", "DEF")  # type: ignore[no-untyped-call]
_kernels: dict[Any, Callable[..., Any]] = {}


class Derivatives(Protocol):
    """An op's derivatives, as a `torch.autograd.Function` states them. They are made of differentiable ops in turn."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what the others need."""

    @staticmethod
    def backward(ctx: Any, saved: tuple[Any, ...], *cotangents: Tensor | None) -> Any:
        """The cotangents of all arguments, by the tensors that were saved for it."""

    @staticmethod
    def jvp(ctx: Any, saved: tuple[Any, ...], *tangents: Tensor | None) -> Any:
        """The tangents of all results, by the tensors that were saved for forward mode."""


class Folding(NamedTuple):
    """Where vmap's new dim goes: it is merged into a dim, or not at all (None), of each tensor."""

    arguments: Sequence[int]
    results: Sequence[int | None]


FoldingOf: TypeAlias = "Callable[..., Folding]"  # of the op's arguments


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The op of this schema. It has one kernel for all devices; `fake` gives the shapes of its results."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"natten::{name}", _outside_onnx(fake), lib=library)
    op = getattr(torch.ops.natten, name).default
    _kernels[op] = kernel
    return op


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """Lets torch count FLOPs of the op by `formula`, of shapes in place of tensors."""
    register_flop_formula(op.overloadpacket)(lambda *shapes, out_shape=None: formula(*shapes))


def transform(op: Any, derivatives: type[Derivatives], folding: FoldingOf) -> None:
    """Registers what the op is under autograd, of any order and in both modes, and under vmap."""
    library.impl(op._opname, _recorded(op, derivatives), "Autograd")
    torch.library.register_vmap(op.name(), _folded(op, folding), lib=library)


def below_autograd(op: Any, arguments: tuple[Any, ...]) -> Any:
    """The op of these arguments, past its kernel for autograd."""
    with _AutoDispatchBelowAutograd():
        return op(*arguments)


def composed(op: Any, arguments: tuple[Any, ...]) -> Any:
    """What the op computes of these arguments in torch's own operations: for ONNX, whose graphs run without this package."""
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, arguments, strict=False))
    if not all(isinstance(number, int) for number in given["axes"]):
        raise NotImplementedError(_ONNX)
    return _kernels[op](**{**given, "backend": "reference"})


_ONNX = (
    "ONNX has no neighborhood attention: torch.onnx.export(module, ..., dynamo=True) composes it of other operations, for one "
    "grid and any batch. Give the exporter the module, no graph of it, and no dynamic shapes but the batch's"
)


def _outside_onnx(fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which no op that the exporter is left with gets past."""

    def shapes(*arguments: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError(_ONNX)
        return fake(*arguments)

    return shapes


# Autograd -----------------------------------------------------------------------------------------------------------


def _recorded(op: Any, derivatives: type[Derivatives]) -> Callable[..., Any]:
    """The op's kernel for autograd: one level of it, of both modes.

    It never asks whether there is something to differentiate, which is not known while a graph is traced: torch does
    so, tensor by tensor, where the Function is applied.
    """

    def forward(*arguments: Any) -> Any:
        # Recording is off inside a Function, but an outer torch.func transform, which is next, wants it on.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below_autograd(op, arguments)

    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # which may be computed now, by what autograd records
        if (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or getattr(ctx, "has_tangents", False)
            or any(map(_has_tangent, cotangents))
        ):
            return derivatives.backward(ctx, saved, *cotangents)
        # Nobody differentiates this in turn: it need not pass the kernels for autograd, which cost 10 us each.
        with _AutoDispatchBelowAutograd():
            return derivatives.backward(ctx, saved, *cotangents)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        ctx.has_tangents = True
        # So is forward mode inside a jvp, where an outer one wants it on; this one's tensors must have no tangents then.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = tuple(map(_without_tangent, ctx.saved_tensors))
            return derivatives.jvp(ctx, saved, *tangents)

    methods = {"forward": forward, "backward": backward, "jvp": jvp}
    # A dispatcher kernel sees one transform at a time: a Function for all of them at once would call itself.
    function: Any = type(
        f"natten_{op._opname}",
        (derivatives, _SingleLevelFunction),
        {name: staticmethod(method) for name, method in methods.items()},
    )

    def kernel(*arguments: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        with enable_single_level_autograd_function():
            return function.apply(*arguments)

    return kernel


def _without_tangent(tensor: Tensor | None) -> Tensor | None:
    # By its number: Python does not know of levels that a compiled graph has entered.
    return None if tensor is None else forward_ad.unpack_dual(tensor, level=0).primal  # type: ignore[no-untyped-call]


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor, level=0).tangent is not None  # type: ignore[no-untyped-call]


# vmap ---------------------------------------------------------------------------------------------------------------


def _folded(op: Any, folding: FoldingOf) -> Callable[..., Any]:
    """The op's rule for vmap: the new dim is merged into one that the op maps over anyway, a view where it is in front."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        into, out_of = folding(*arguments)
        # Of nothing, the shapes of results could not be told apart again: one sample of zeros stands for it.
        size = max(1, info.batch_size)
        count = len(into)
        tensors = (
            _fold(tensor, dim, size, where)
            for tensor, dim, where in zip(arguments[:count], in_dims[:count], into, strict=True)
        )
        results = op(*tensors, *arguments[count:])
        parts = (results,) if isinstance(results, Tensor) else results
        unfolded = tuple(
            part if where is None else _unfold(part, size, where)[: info.batch_size]
            for part, where in zip(parts, out_of, strict=True)
        )
        out_dims = tuple(None if where is None else 0 for where in out_of)
        return (unfolded[0], 0) if isinstance(results, Tensor) else (unfolded, out_dims)

    return rule


def _fold(tensor: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """`tensor` with dim `dim` (None: the same for all) of size `size`, or of none, merged into dim `into`."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
        if tensor.shape[0] != size:
            tensor = tensor.new_zeros(size, *tensor.shape[1:])
    into %= tensor.dim() - 1
    return tensor.movedim(0, into).flatten(into, into + 1)


def _unfold(tensor: Tensor, size: int, out_of: int) -> Tensor:
    shape = list(tensor.shape)
    out_of %= len(shape)
    shape[out_of : out_of + 1] = [size, shape[out_of] // size]
    return tensor.reshape(shape).movedim(out_of, 0)
