# SPDX-License-Identifier: MIT
"""From a call to a kernel: autocast, normalisation, choice of a backend, and the run."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from natten import _autotune, _dispatch, _flex, _ops, _unfused
from natten._axes import TILE_ARGUMENTS, normalize_tile_shapes
from natten._errors import reject
from natten._problem import (
    AvOperands,
    Operands,
    Problem,
    QkOperands,
    TensorInfo,
    describe,
    normalize,
    normalize_av,
    normalize_dense,
    normalize_qk,
)
from natten._settings import AutotunerContext
from natten._signature import lse_dtype


class Plan(NamedTuple):
    """What a call means, and who runs it."""

    problem: Problem
    backend: str
    needs_grad: bool


class _PerAxis(NamedTuple):
    """A list or tuple argument as part of a cache key; by its types, too, as True == 1."""

    values: tuple[Any, ...]
    types: tuple[type, ...]


# Equal ones mean the same, and go on meaning it.
_PLAIN = frozenset((int, bool, float, str, type(None)))


def _key(argument: Any) -> Any:
    """`argument` as part of a cache key: by its value now, not by who it is."""
    if type(argument) in _PLAIN:
        return argument
    if type(argument) in (list, tuple, torch.Size):
        values = tuple(map(_key, argument))
        if _PLAIN.issuperset(map(type, values)):
            return _PerAxis(values, tuple(map(type, values)))
    if isinstance(argument, numbers.Integral):
        return operator.index(argument)
    if isinstance(argument, numbers.Real):
        return float(argument)
    message = f"a {type(argument).__name__} may change what it stands for"
    raise TypeError(message)


def _value(key: Any) -> Any:
    return key.values if isinstance(key, _PerAxis) else key


@lru_cache(maxsize=1024, typed=True)
def _cached_plan(
    normalizer: Callable[..., Problem],
    needs_grad: bool,
    backend: str,
    isa: str,
    infos: tuple[TensorInfo | None, ...],
    *keys: Any,
) -> Plan:
    problem = normalizer(infos, *map(_value, keys))
    return Plan(problem, _dispatch.select(problem, needs_grad, backend, isa), needs_grad)


_dispatch.caches_of_choices.append(_cached_plan.cache_clear)


def _plan(
    normalizer: Callable[..., Problem],
    operands: tuple[Tensor | None, ...],
    infos: tuple[TensorInfo | None, ...],
    arguments: tuple[Any, ...],
    backend: str | None,
) -> Plan:
    needs_grad = _needs_grad(operands)
    if torch.compiler.is_compiling():
        problem = normalizer(infos, *arguments)
        return Plan(problem, _dispatch.select_in_graph(problem, backend), needs_grad)
    name = _dispatch.backend_in_force() if backend is None else _dispatch.canonical(backend)
    isa = _dispatch.forced_isa()
    try:
        keys = arguments if _PLAIN.issuperset(map(type, arguments)) else map(_key, arguments)
        return _cached_plan(normalizer, needs_grad, name, isa, infos, *keys)
    except (
        TypeError
    ):  # Something is no key: a symbolic size, an array, a tensor, an object of somebody else's.
        return _cached_plan.__wrapped__(normalizer, needs_grad, name, isa, infos, *arguments)


def _needs_grad(operands: tuple[Tensor | None, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(tensor is not None and tensor.requires_grad for tensor in operands)
    # The same, in a tenth of the time; nothing that can be traced.
    return torch._C._any_requires_grad(*operands)


_T = TypeVar("_T", Operands, QkOperands, AvOperands)


def _autocast(operands: _T) -> _T:
    """The operands in the type that autocast wants, if it is on for their device; never those in float64."""
    first = operands[0]
    if not isinstance(first, Tensor) or first.device.type == "meta":
        return operands
    if not torch.is_autocast_enabled(first.device.type):
        return operands
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(name: str, tensor: Any) -> Any:
        if name == "rpb" or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return type(operands)(*map(cast, operands._fields, operands))


def scaled(query: Tensor, scale: float | Tensor) -> Tensor:
    """`query` [..., heads, head_dim] times `scale`: a number, or a tensor, of one or of one per head, with a gradient."""
    if not isinstance(scale, Tensor):
        return query * scale
    heads = query.shape[-2]
    if tuple(scale.shape) not in ((), (1,), (heads,)):
        wanted = f"() or ({heads},): one number, or one per head"
        reject("scale.shape", tuple(scale.shape), wanted)
    if scale.dtype == torch.bool or scale.is_complex():
        reject("scale.dtype", scale.dtype, "real numbers")
    if scale.dim() > 0 and scale.device != query.device:
        reject("scale.device", scale.device, f"{query.device}, as the query", "move one")
    compute = lse_dtype(query.dtype)
    factor = scale.to(compute)
    return (query.to(compute) * (factor[:, None] if scale.dim() else factor)).to(query.dtype)


_BY_COST = (None,) * len(TILE_ARGUMENTS)


def _run(
    normalizer: Callable[..., Problem],
    backend: str | None,
    operands: Operands,
    arguments: tuple[Any, ...],
    tile_shapes: tuple[Any, ...] = _BY_COST,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a problem; the last of the normalizer's `arguments` is the scale."""
    if torch._C._is_any_autocast_enabled():
        operands = _autocast(operands)
    tensors: tuple[Tensor | None, ...] = operands
    scale = arguments[-1]
    if isinstance(
        scale, Tensor
    ):  # no number of the problem, but a factor of the query, which has a gradient
        tensors, arguments = (*operands, scale), (*arguments[:-1], 1.0)
    plan = _plan(normalizer, tensors, operands.describe(), arguments, backend)
    problem = plan.problem
    for dim, start, length in problem.narrowing:
        operands = operands._replace(query=operands.query.narrow(dim, start, length))
    if isinstance(scale, Tensor):
        operands = operands._replace(query=scaled(operands.query, scale))
    name = plan.backend
    if name == "flex":
        if operands.query.numel() > 0 and operands.key.numel() > 0:
            return _flex.forward(operands, problem.flat_axes, problem.scale)
        name = "reference"  # FlexAttention takes no empty tensors, and there is nothing to compute
    if operands.rpb is not None:
        operands = operands._replace(rpb=operands.rpb.to(lse_dtype(problem.dtype)))
    settings: tuple[Any, ...] = problem.flat_axes, problem.scale, name
    if tile_shapes != _BY_COST:
        settings += (normalize_tile_shapes(tile_shapes, problem.rank),)
        if plan.needs_grad:
            _ops.check_backward(operands, *settings)
    elif AutotunerContext.enabled_for_forward or AutotunerContext.enabled_for_backward:
        settings += (_autotune.tile_shapes(problem, name, plan.needs_grad, operands),)
    return _ops.run(_ops.FORWARD, plan.needs_grad, *operands, *settings)  # type: ignore[no-any-return]


def neighborhood(
    rank: int | None,
    backend: str | None,
    operands: Operands,
    *arguments: Any,
    tile_shapes: tuple[Any, ...] = _BY_COST,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of neighborhood attention.

    `arguments` are those of `normalize`, from kernel_size on, and `tile_shapes` the values of `TILE_ARGUMENTS`.
    """
    return _run(normalize, backend, operands, (rank, *arguments), tile_shapes)


def dense(
    backend: str | None, operands: Operands, is_causal: bool, scale: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE of dense attention."""
    return _run(normalize_dense, backend, operands, (is_causal, scale))


def qk(rank: int, backend: str | None, operands: QkOperands, *arguments: Any) -> Tensor:
    """Attention weights before the softmax. `arguments` are those of `normalize_qk`, from kernel_size on."""
    if torch._C._is_any_autocast_enabled():
        operands = _autocast(operands)
    plan = _plan(normalize_qk, operands, describe(operands), (rank, *arguments), backend)
    query, key, additional_keys, rpb = operands
    for dim, start, length in plan.problem.narrowing:
        query = query.narrow(dim, start, length)
    if rpb is not None:
        rpb = rpb.to(lse_dtype(query.dtype))
    settings = plan.problem.flat_axes, True, plan.backend
    weights: Tensor = _ops.run(_unfused.QK, plan.needs_grad, query, key, rpb, *settings)
    if additional_keys is None:
        return weights
    return torch.cat([weights, _unfused.dense_product(query, additional_keys.mT)], dim=-1)


def av(rank: int, backend: str | None, operands: AvOperands, *arguments: Any) -> Tensor:
    """Sums by attention weights. `arguments` are those of `normalize_av`, from kernel_size on."""
    if torch._C._is_any_autocast_enabled():
        operands = _autocast(operands)
    plan = _plan(normalize_av, operands, describe(operands), (rank, *arguments), backend)
    attn, value, additional_values = operands
    slots = attn.shape[-1] - plan.problem.additional_keys
    settings = plan.problem.flat_axes, plan.backend
    output: Tensor = _ops.run(_unfused.AV, plan.needs_grad, attn[..., :slots], value, *settings)
    if additional_values is None:
        return output
    return output + _unfused.dense_product(attn[..., slots:], additional_values)


@dataclass(frozen=True)
class Explanation:
    """What would run a problem, and why not something else; prints itself.

    Attributes:
        candidates: Every way to run the problem, in order of preference.
        backend: What was asked for.
        selected: The candidate that would run; None if nothing would.
    """

    candidates: tuple[_dispatch.Candidate, ...]
    backend: str
    selected: _dispatch.Candidate | None

    def __str__(self) -> str:
        marks = ("->" if candidate is self.selected else "  " for candidate in self.candidates)
        lines = [f"{mark} {c}" for mark, c in zip(marks, self.candidates, strict=True)]
        return "\n".join([f"backend {self.backend!r}:", *lines])


_EXPLAINED = ("attention", "qk", "av")


def explain(
    op: str, backend: str | None, device: str | None, operands: Operands, *arguments: Any
) -> Explanation:
    """What would run the problem. `arguments` are those of `normalize`, from kernel_size on."""
    if op not in _EXPLAINED:
        reject("op", repr(op), f"one of {', '.join(map(repr, _EXPLAINED))}")
    name = _dispatch.backend_in_force() if backend is None else _dispatch.canonical(backend)
    operands = _autocast(operands)
    tensors: tuple[Tensor | None, ...] = operands
    if isinstance(arguments[-1], Tensor):
        tensors, arguments = (*operands, arguments[-1]), (*arguments[:-1], 1.0)
    problem = normalize(operands.describe(), None, *arguments)
    if op != "attention":
        # Their kernels see the window's slots, and tokens of one head dim.
        head_dim = problem.head_dim if op == "qk" else problem.head_dim_value
        problem = replace(
            problem,
            op=op,
            head_dim=head_dim,
            head_dim_value=head_dim,
            additional_keys=0,
            has_rpb=problem.has_rpb and op == "qk",
        )
    isa = _dispatch.forced_isa()
    found = _dispatch.candidates(problem, _needs_grad(tensors), isa, device, name)
    asked = (c for c in found if c.belongs_to(name) and not c.reasons)
    return Explanation(tuple(found), name, next(asked, None))
