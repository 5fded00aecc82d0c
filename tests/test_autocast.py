# SPDX-License-Identifier: MIT
"""Autocast decides about the types of operands, and about nothing behind them."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

import natten
from natten import reference
from natten._problem import Operands
from natten.functional import na2d_av, na2d_qk
from tests.cases import random_problem
from tests.oracle import assert_close
from tests.test_torch import as_op, leaves

PROBLEM = random_problem(("rank2", "rpb", "additional", "gqa", "value_dim", "zeros"), 1)
PROBLEM = replace(PROBLEM, head_dim=16, scale=None, magnitude=1.0, strided=False)


def casting():
    return torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16)


def with_and_without(function, *tensors):
    """What a function of tensors returns, and its first and second derivatives, all under autocast, and none."""
    found = []
    for context in (casting(), contextlib.nullcontext()):
        inputs = leaves(tensors)
        present = [t for t in inputs if t is not None]
        with context:
            outputs = function(*inputs)
            loss = sum(output.sin().sum() for output in outputs)
            first = torch.autograd.grad(loss, present, create_graph=True)
            second = torch.autograd.grad(sum(g.sin().sum() for g in first), present)
        found.append([*outputs, *first, *second])
    return found


def assert_same(function, *tensors):
    for mine, right in zip(*with_and_without(function, *tensors), strict=True):
        assert mine.dtype == right.dtype
        assert torch.equal(mine, right)


@pytest.mark.parametrize("backend", ["reference", "naive", "auto"])
def test_ops_compute_in_the_types_of_their_tensors(backend):
    *operands, axes, scale = as_op(PROBLEM, PROBLEM.operands(torch.float32))
    assert_same(lambda *t: torch.ops.natten.forward(*t, axes, scale, backend), *operands)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_unfused_ops_too(backend):
    axes = [6, 3, 1, 1, 0, 0, 0, 0, 6, 0, 6]
    query, key, rpb = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(4, 5)
    ops = torch.ops.natten
    assert_same(lambda *t: [ops.qk(*t, axes, False, backend)], query, key, rpb)
    weights = torch.randn(1, 4, 6, 3)
    assert_same(lambda *t: [ops.av(*t, axes, backend)], weights, key)
    assert_same(lambda *t: [ops.av_transposed(*t, axes, 2, backend)], weights, query)
    assert_same(lambda *t: [ops.rpb_gradient(*t, axes, backend)], weights)


def test_the_reference_and_merging():
    *operands, axes, scale = as_op(PROBLEM, PROBLEM.operands(torch.float32))
    with casting():
        output, lse = reference.forward(Operands(*operands), tuple(axes), scale)
    right, right_lse = reference.forward(Operands(*operands), tuple(axes), scale)
    assert torch.equal(output, right)
    assert torch.equal(lse, right_lse)
    parts = torch.randn(2, 1, 5, 2, 8), torch.randn(2, 1, 5, 2)
    assert_same(lambda o, x: natten.merge_attentions(o.unbind(), x.unbind()), *parts)


@pytest.mark.parametrize("backend", ["reference", "naive", "flex"])
def test_lse_under_autocast_is_that_of_the_rounded_operands(backend):
    x = torch.randn(1, 6, 6, 2, 32)
    with casting():
        _, lse = natten.na2d(x, x, x, 3, backend=backend, return_lse=True)
    rounded = x.bfloat16().double()
    _, right = natten.na2d(rounded, rounded, rounded, 3, backend="reference", return_lse=True)
    # Of FlexAttention on a CPU, logits are rounded to the operands' type.
    assert_close(lse, right, 0.05 if backend == "flex" else 1e-5)


def test_additional_tokens_of_unfused_halves():
    x, more = torch.randn(1, 2, 5, 5, 8), torch.randn(1, 2, 3, 8)
    with casting():
        attn = na2d_qk(x, x, 3, additional_keys=more)
        output = na2d_av(attn, x, 3, additional_values=more)
    half, more = x.bfloat16(), more.bfloat16()
    assert torch.equal(attn, na2d_qk(half, half, 3, additional_keys=more))
    assert torch.equal(output, na2d_av(attn, half, 3, additional_values=more))


@pytest.mark.cpu
def test_explain_says_the_type_that_runs():
    x = torch.randn(1, 16, 2, 8)
    for dtype, context in ((torch.float32, contextlib.nullcontext()), (torch.bfloat16, casting())):
        with context:
            explained = natten.explain(x, x, x, 3)
            unfused = natten.explain(x, x, x, 3, op="qk")
        y = x.to(dtype)
        assert explained.selected == natten.explain(y, y, y, 3).selected
        assert unfused.selected == natten.explain(y, y, y, 3, op="qk").selected
