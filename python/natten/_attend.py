# SPDX-License-Identifier: MIT
"""From a call to a kernel: autocast, normalisation, choice of a backend, and the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten import _dispatch, _flex, _ops
from natten._problem import Problem, TensorInfo, describe, normalize, normalize_dense


class Plan(NamedTuple):
    """What a call means, and who runs it."""

    problem: Problem
    backend: str


class _PerAxis(NamedTuple):
    """A list or tuple argument as part of a cache key; by its types, too, as True == 1."""

    values: tuple[Any, ...]
    types: tuple[type, ...]


def _key(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return _PerAxis(tuple(argument), tuple(map(type, argument)))
    return argument


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
    problem = normalizer(*infos, *map(_value, keys))
    return Plan(problem, _dispatch.select(problem, needs_grad, backend, isa))


def _plan(
    normalizer: Callable[..., Problem],
    tensors: tuple[Tensor | None, ...],
    infos: tuple[TensorInfo | None, ...],
    arguments: tuple[Any, ...],
    backend: str | None,
) -> Plan:
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        problem = normalizer(*infos, *arguments)
        return Plan(problem, _dispatch.select_in_graph(problem, needs_grad, backend))
    name = _dispatch.backend_in_force() if backend is None else _dispatch.canonical(backend)
    isa = _dispatch.forced_isa()
    try:
        return _cached_plan(normalizer, needs_grad, name, isa, infos, *map(_key, arguments))
    except TypeError:  # Something in the key cannot be hashed: a symbolic size, an array.
        return _cached_plan.__wrapped__(normalizer, needs_grad, name, isa, infos, *map(_key, arguments))


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def _in_autocast(query: Any) -> torch.dtype | None:
    """The type that autocast wants, if it is on for the device of `query`."""
    if not isinstance(query, Tensor):
        return None
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _run(plan: Plan, operands: _ops.Operands) -> tuple[Tensor, Tensor]:
    problem = plan.problem
    query, *others, rpb = operands
    for dim, axis in enumerate(problem.axes, start=1):
        if axis.query_extent != query.shape[dim]:
            query = query.narrow(dim, problem.skipped[dim - 1], axis.query_extent)
    if plan.backend == "flex":
        return _flex.forward(query, *others, problem.flat_axes, problem.scale)  # type: ignore[arg-type]
    if rpb is not None:
        rpb = rpb.to(_ops.lse_dtype(problem.dtype))
    return _ops.attend((query, *others, rpb), problem.flat_axes, problem.scale, plan.backend)  # type: ignore[arg-type]


def neighborhood(
    rank: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    backend: str | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of neighborhood attention. `arguments` are those of `normalize`, from kernel_size on."""
    dtype = _in_autocast(query)
    if dtype is not None:
        query, key, value, additional_keys, additional_values = (
            _autocast(t, dtype) for t in (query, key, value, additional_keys, additional_values)
        )
    operands = (query, key, value, additional_keys, additional_values, rpb)
    return _run(_plan(normalize, operands, _infos(*operands), (rank, *arguments), backend), operands)


def dense(
    query: Tensor, key: Tensor, value: Tensor, backend: str | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and LSE of dense attention."""
    dtype = _in_autocast(query)
    if dtype is not None:
        query, key, value = (_autocast(tensor, dtype) for tensor in (query, key, value))
    infos = (describe("query", query), describe("key", key), describe("value", value))
    plan = _plan(normalize_dense, (query, key, value), infos, (is_causal, scale), backend)
    return _run(plan, (query, key, value, None, None, None))


def _infos(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
) -> tuple[TensorInfo | None, ...]:
    return (
        describe("query", query),
        describe("key", key),
        describe("value", value),
        None if additional_keys is None else describe("additional_keys", additional_keys),
        None if additional_values is None else describe("additional_values", additional_values),
        None if rpb is None else describe("rpb", rpb),
    )


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


def explain(
    operands: _ops.Operands, rank: int | None, backend: str | None, *arguments: Any
) -> Explanation:
    """What would run the problem. `arguments` are those of `normalize`, from kernel_size on."""
    name = _dispatch.backend_in_force() if backend is None else _dispatch.canonical(backend)
    problem = normalize(*_infos(*operands), rank, *arguments)
    needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*operands)  # type: ignore[attr-defined]
    found = tuple(_dispatch.candidates(problem, needs_grad, _dispatch.forced_isa()))
    asked = (c for c in found if name in ("auto", c.backend) and not c.reasons)
    return Explanation(found, name, next(asked, None))
