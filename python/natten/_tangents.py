# SPDX-License-Identifier: MIT
"""Directional derivatives of fused attention and of its gradients, composed of the unfused ops.

These two are all that forward mode and second derivatives need: a gradient is the vector of directional derivatives,
so what cotangents of the gradients pull back to is a directional derivative of the gradients, too. Both are made of
differentiable ops, which gives them derivatives of any order, and run on the compiled kernels of the unfused ops. They
compute in float32 at least, as weights are in memory here, and not within a kernel. Results are contiguous, as those of the
ops are: torch copies a tangent whose layout is not its tensor's, and where sizes are symbolic it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from natten import _C
from natten._autocast import without_autocast
from natten._axes import AXIS_INTS
from natten._problem import Operands
from natten._signature import lse_dtype
from natten._unfused import AV, AV_TRANSPOSED, QK, RPB_GRADIENT, dense_product, dense_transposed

# One for each operand; None: it does not change.
Tangents: TypeAlias = "Sequence[Tensor | None]"

_KERNEL_SIZE = _C.AXIS_FIELDS.index("kernel_size")
_QUERY_ORIGIN = _C.AXIS_FIELDS.index("query_origin")
_QUERY_EXTENT = _C.AXIS_FIELDS.index("query_extent")
# Numbers in a tensor of weights, 64 MiB in float32; about six of them are in memory at once.
_LARGEST_WEIGHTS = 1 << 24


@without_autocast
def of_output(
    operands: Operands, tangents: Tangents, axes: Sequence[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """How output and LSE change along the tangents of the operands."""
    outputs, lses = [], []
    for part in _parts(operands, tangents, axes, scale, backend):
        window, o, t = part.window, part.operands, part.tangents
        weights = _softmax(window.logits(o))
        mean, d_weights = _change_of_softmax(weights, window.change_of_logits(o, t))
        output = _total(
            window.sums(d_weights, o.value, o.additional_values),
            window.sums(weights, t.value, t.additional_values),
        )
        width = operands.value.shape[-1]
        outputs.append(_or_zeros(output, o.query, width))
        lses.append(_or_zeros(mean, o.query, 1))
    return (
        torch.cat(outputs, 2).movedim(1, -2).to(operands.query.dtype).contiguous(),
        torch.cat(lses, 2).movedim(1, -2).squeeze(-1).contiguous(),
    )


@without_autocast
def of_gradients(
    operands: Operands,
    tangents: Tangents,
    cotangents: tuple[Tensor, Tensor | None],
    changes: tuple[Tensor | None, Tensor | None],
    axes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """How the operands' gradients change along the tangents of the operands and the `changes` of the cotangents.

    `cotangents` are those of output and LSE.
    """
    of_parts = [
        _change_of_gradients(part, scale)
        for part in _parts(operands, tangents, axes, scale, backend, *cotangents, *changes)
    ]
    queries, *shared = zip(*of_parts, strict=True)
    gradients = [torch.cat(queries, 2), *(_total(*parts) for parts in shared)]
    return tuple(
        None if operand is None else _like(gradient, operand, heads_first=i < 5)
        for i, (gradient, operand) in enumerate(zip(gradients, operands, strict=True))
    )


class _Window(NamedTuple):
    """The unfused operations, for additional tokens, too: columns of weights are the window's slots, then those."""

    axes: list[int]
    backend: str

    def _slots(self) -> int:
        return math.prod(self.axes[_KERNEL_SIZE::AXIS_INTS])

    def products(
        self,
        rows: Tensor | None,
        key: Tensor | None,
        more_keys: Tensor | None,
        more: int,
        rpb: Tensor | None = None,
        is_masked: bool = False,
    ) -> Tensor | None:
        """Products of the rows with the keys of their windows and `more` additional ones, of which some may be 0."""
        if rows is None or (key is None and more_keys is None):
            return None
        by_slot = by_token = None
        if key is not None:
            by_slot = QK(rows, key, rpb, self.axes, is_masked, self.backend)
        if more == 0:
            return by_slot
        if more_keys is not None:
            by_token = dense_product(rows, more_keys.mT)
        columns = _or_zeros(by_slot, rows, self._slots()), _or_zeros(by_token, rows, more)
        return torch.cat(columns, -1)

    def logits(self, o: Operands) -> Tensor:
        """Of operands whose query is scaled."""
        logits = self.products(o.query, o.key, o.additional_keys, _count(o), o.rpb, is_masked=True)
        assert logits is not None
        return logits

    def change_of_logits(self, o: Operands, t: Operands) -> Tensor | None:
        """The same along the tangents `t`."""
        rows = t.query
        if rows is None and t.rpb is not None:
            rows = o.query.new_zeros(()).expand_as(o.query)
        return _total(
            self.products(rows, o.key, o.additional_keys, _count(o), t.rpb),
            self.products(o.query, t.key, t.additional_keys, _count(o)),
        )

    def sums(
        self, weights: Tensor | None, value: Tensor | None, more_values: Tensor | None
    ) -> Tensor | None:
        """Tokens of the queries: sums of values by their weights."""
        if weights is None:
            return None
        slots, by_slot, by_token = self._slots(), None, None
        if value is not None:
            by_slot = AV(weights[..., :slots], value, self.axes, self.backend)
        if more_values is not None:
            by_token = dense_product(weights[..., slots:], more_values)
        return _total(by_slot, by_token)

    def transposed_sums(
        self, weights: Tensor | None, x: Tensor | None, heads_kv: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the keys, and additional ones: sums of queries by their weights."""
        if weights is None or x is None:
            return None, None
        slots = self._slots()
        by_slot = AV_TRANSPOSED(weights[..., :slots], x, self.axes, heads_kv, self.backend)
        if weights.shape[-1] == slots:
            return by_slot, None
        return by_slot, dense_transposed(weights[..., slots:], x, heads_kv)

    def rpb_gradient(self, weights: Tensor | None) -> Tensor | None:
        """Of the logits' gradient."""
        if weights is None:
            return None
        gradient: Tensor = RPB_GRADIENT(weights[..., : self._slots()], self.axes, self.backend)
        return gradient


class _Part(NamedTuple):
    """What some of the queries have to do with. Tensors are heads first, in the type computed in; queries are scaled."""

    window: _Window
    operands: Operands
    tangents: Operands  # with None for what does not change
    d_output: Tensor | None = None
    d_lse: Tensor | None = None  # with a last dim of 1, as its change
    t_d_output: Tensor | None = None
    t_d_lse: Tensor | None = None


def _parts(
    operands: Operands,
    tangents: Tangents,
    axes: Sequence[int],
    scale: float,
    backend: str,
    d_output: Tensor | None = None,
    d_lse: Tensor | None = None,
    t_d_output: Tensor | None = None,
    t_d_lse: Tensor | None = None,
) -> Iterator[_Part]:
    """The grid in slabs along its first axis, so that the weights of one fit into memory."""
    compute = lse_dtype(operands.query.dtype)

    def tokens(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(compute).movedim(-2, 1)

    def rows(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(compute).unsqueeze(-1).movedim(-2, 1)

    def heads_first(given: Tangents) -> Operands:
        tensors: list[Any] = [*map(tokens, given[:5]), given[5]]
        if tensors[0] is not None:
            tensors[0] = tensors[0] * scale
        if tensors[5] is not None:
            tensors[5] = tensors[5].to(compute)
        return Operands(*tensors)

    first, second = heads_first(operands), heads_first(tangents)
    of_queries = tokens(d_output), rows(d_lse), tokens(t_d_output), rows(t_d_lse)
    name = backend if backend == "reference" else backend.partition(":")[0]
    unfused = name if name in ("naive", "reference") else "auto"
    flat = list(axes)
    extent = first.query.shape[2]
    columns = math.prod(flat[_KERNEL_SIZE::AXIS_INTS]) + _count(first)
    numbers = math.prod(first.query.shape[:-1]) * columns
    if numbers <= _LARGEST_WEIGHTS:
        yield _Part(_Window(flat, unfused), first, second, *of_queries)
        return
    slab = max(1, _LARGEST_WEIGHTS * extent // numbers)
    origin = flat[_QUERY_ORIGIN]
    for begin in range(0, extent, slab):
        length = min(slab, extent - begin)

        def narrow(tensor: Tensor | None, begin: int = begin, length: int = length) -> Any:
            return None if tensor is None else tensor.narrow(2, begin, length)

        box = list(flat)
        box[_QUERY_ORIGIN], box[_QUERY_EXTENT] = origin + begin, length
        yield _Part(
            _Window(box, unfused),
            first._replace(query=narrow(first.query)),
            second._replace(query=narrow(second.query)),
            *map(narrow, of_queries),
        )


def _change_of_gradients(part: _Part, scale: float) -> tuple[Tensor | None, ...]:
    """Of the query, which is never None, and the other operands."""
    window, o, t, d_output, d_lse, t_d_output, t_d_lse = part
    heads_kv, more = o.key.shape[1], _count(o)
    weights = _softmax(window.logits(o))
    _, t_weights = _change_of_softmax(weights, window.change_of_logits(o, t))
    d_weights = window.products(d_output, o.value, o.additional_values, more)
    assert d_weights is not None
    t_d_weights = _total(
        window.products(t_d_output, o.value, o.additional_values, more),
        window.products(d_output, t.value, t.additional_values, more),
    )
    # The logits' gradient is weights * centred, and all other gradients are linear in it or in the weights.
    mean = (weights * d_weights).sum(-1, keepdim=True)
    centred = d_weights - (mean if d_lse is None else mean - d_lse)
    t_mean = _total(
        None if t_weights is None else (t_weights * d_weights).sum(-1, keepdim=True),
        None if t_d_weights is None else (weights * t_d_weights).sum(-1, keepdim=True),
        None if t_d_lse is None else -t_d_lse,
    )
    t_centred = _total(t_d_weights, None if t_mean is None else -t_mean)
    d_logits = weights * centred
    t_d_logits = _total(
        None if t_weights is None else t_weights * centred,
        None if t_centred is None else weights * t_centred,
    )
    query = _total(
        window.sums(t_d_logits, o.key, o.additional_keys),
        window.sums(d_logits, t.key, t.additional_keys),
    )
    key, more_keys = map(
        _total,
        window.transposed_sums(t_d_logits, o.query, heads_kv),
        window.transposed_sums(d_logits, t.query, heads_kv),
    )
    value, more_values = map(
        _total,
        window.transposed_sums(t_weights, d_output, heads_kv),
        window.transposed_sums(weights, t_d_output, heads_kv),
    )
    rpb = None if o.rpb is None else window.rpb_gradient(t_d_logits)
    scaled = None if query is None else query * scale
    return (_or_zeros(scaled, o.query, o.query.shape[-1]), key, value, more_keys, more_values, rpb)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax whose rows without a key, of -inf alone, are 0, and pass on no NaN."""
    # It does not change with what is subtracted: no gradient needs to flow through that.
    shift = logits.detach().amax(-1, keepdim=True)
    weights = (logits - shift.masked_fill(shift == -math.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def _change_of_softmax(
    weights: Tensor, d_logits: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of its LSE, with a last dim of 1, and of itself."""
    if d_logits is None:
        return None, None
    mean = (weights * d_logits).sum(-1, keepdim=True)
    return mean, weights * (d_logits - mean)


def _count(o: Operands) -> int:
    """Additional tokens of operands heads first."""
    return 0 if o.additional_keys is None else o.additional_keys.shape[2]


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _or_zeros(tensor: Tensor | None, rows: Tensor, width: int) -> Tensor:
    """`tensor`, or zeros: `width` for each of the rows."""
    return rows.new_zeros(*rows.shape[:-1], width) if tensor is None else tensor


def _like(gradient: Tensor | None, operand: Tensor, heads_first: bool) -> Tensor:
    if gradient is None:
        return operand.new_zeros(operand.shape)
    return (gradient.movedim(1, -2) if heads_first else gradient).to(operand.dtype).contiguous()
