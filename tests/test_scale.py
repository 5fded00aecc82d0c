# SPDX-License-Identifier: MIT
"""A scale that is a tensor has a gradient, and no argument is remembered by who it is instead of by its value."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from torch.func import grad, jvp, vmap

import natten
from natten.varlen import neighborhood_attention_varlen
from tests import oracle
from tests.cases import random_problem
from tests.oracle import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"
)
FEATURES = [("rank1", "gqa"), ("rank2", "valid", "value_dim"), ("rank3", "rpb", "additional")]


def problem_of(features):
    return replace(
        random_problem(features, 3), head_dim=8, heads=4, heads_kv=2, magnitude=1.0, scale=1.0
    )


def scaled_call(problem, backend=None):
    """Output and LSE of operands, and of a scale."""

    def function(query, key, value, more_keys, more_values, rpb, scale):
        arguments = problem.arguments() | {"scale": scale, "backend": backend, "return_lse": True}
        more = {"additional_keys": more_keys, "additional_values": more_values, "rpb": rpb}
        return natten.neighborhood_attention_generic(query, key, value, **arguments, **more)

    return function


def by_oracle(problem):
    def function(query, *others):
        *others, scale = others
        factor = scale[:, None] if scale.dim() and len(scale) > 1 else scale
        return oracle.dense(problem, (query * factor, *others), torch.float64)

    return function


@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_gradient_of_scale(features, dtype, shape):
    problem = problem_of(features)
    operands = [*problem.operands(torch.float32), torch.rand(shape) + 0.2]
    given = [None if t is None else t.to(dtype) for t in operands]
    if dtype == torch.bfloat16:
        given[-1] = operands[-1]  # parameters stay float32
    exact = [None if t is None else t.double() for t in given]
    results = oracle.run(scaled_call(problem), given)
    expected = oracle.run(by_oracle(problem), exact)
    for result, right in zip(results, expected, strict=True):
        if right is not None:
            finite = right.masked_fill(right.isinf(), 0).abs().max().item()
            assert_close(result, right, 64 * torch.finfo(dtype).eps * max(1.0, finite))


def loss_of(problem, operands):
    query, *others = operands
    return lambda scale, query=query: scaled_call(problem)(query, *others, scale)[0].sin().sum()


def test_transforms_of_a_scale():
    problem = problem_of(("rank2", "causal"))
    operands = problem.operands(torch.float64)
    scales = torch.rand(3, 4, dtype=torch.float64)
    loss, exact = loss_of(problem, operands), by_oracle(problem)

    def right(scale, query=operands[0]):
        return exact(query, *operands[1:], scale)[0].sin().sum()

    assert torch.allclose(vmap(grad(loss))(scales), torch.stack([grad(right)(s) for s in scales]))
    moved = torch.rand(4, dtype=torch.float64)
    for mine, theirs in zip(
        jvp(loss, (scales[0],), (moved,)), jvp(right, (scales[0],), (moved,)), strict=True
    ):
        assert torch.allclose(mine, theirs)
    one = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (one,))
    assert torch.autograd.gradgradcheck(loss, (one,))


@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_compiled(counter, shape):
    problem = problem_of(("rank2", "causal"))
    operands = problem.operands(torch.float32)
    loss = loss_of(problem, operands)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for _ in range(2):
        scale = torch.rand(shape, requires_grad=True)
        (found,) = torch.autograd.grad(compiled(scale, operands[0]), scale)
        (expected,) = torch.autograd.grad(loss(scale), scale)
        assert_close(found, expected, 1e-4)
    assert counter.frame_count == 1


def test_attention_and_varlen():
    x = torch.randn(1, 12, 2, 8, dtype=torch.float64)
    scale = torch.rand(2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(natten.attention(x, x, x, scale=scale).sin().sum(), scale)
    logits = torch.einsum("bqhd,bkhd->bhqk", x * scale[:, None], x)
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), x)
    assert torch.allclose(found, torch.autograd.grad(expected.sin().sum(), scale)[0])
    grids = {"token_layout_list": [(5,), (7,)], "kernel_size": 3, "scale": scale}
    output = neighborhood_attention_varlen(x, x, x, **grids)
    parts = [natten.na1d(p * scale[:, None], p, p, 3, scale=1.0) for p in x.split([5, 7], dim=1)]
    assert torch.allclose(output, torch.cat(parts, 1))
    (found,) = torch.autograd.grad(output.sin().sum(), scale)
    assert torch.allclose(found, torch.autograd.grad(torch.cat(parts, 1).sin().sum(), scale)[0])


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_module_that_learns_its_scale(shape):
    scale = torch.nn.Parameter(torch.rand(shape) + 0.2)
    module = natten.NeighborhoodAttention2D(12, 3, 3, qk_scale=scale)
    x = torch.randn(2, 5, 6, 12)
    found = []
    for is_fused in (True, False):
        with torch.no_grad():
            scale += 0.1 * is_fused  # a later call uses the later value
        output = module(x) if is_fused else module(x, return_weights=True)[0]
        found.append((output, torch.autograd.grad(output.sin().sum(), scale)[0]))
    assert_close(found[0][0], found[1][0], 1e-5)
    assert_close(found[0][1], found[1][1], 1e-4)
    assert found[0][1].abs().max() > 1e-3


WRONG_SCALES = {
    "two of four": (torch.tensor([1.0, 2.0]), r"scale.shape = \(2,\); wanted \(\) or \(4,\)"),
    "a matrix": (torch.ones(4, 1), r"scale.shape = \(4, 1\)"),
    "bool": (torch.tensor(True), r"scale.dtype = torch.bool; wanted real"),
    "complex": (torch.tensor(1j), r"scale.dtype"),
    "elsewhere": (torch.ones(4, device="meta"), r"scale.device = meta"),
    "a list": ([1.0], r"scale = \(1.0,\); wanted a number"),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", WRONG_SCALES)
def test_wrong_scales(case):
    scale, match = WRONG_SCALES[case]
    x = torch.randn(1, 6, 4, 8)
    for call in (
        lambda: natten.na1d(x, x, x, 3, scale=scale),
        lambda: natten.attention(x, x, x, scale=scale),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_explain_takes_a_scale_that_wants_a_gradient():
    x = torch.randn(1, 6, 4, 8)
    scale = torch.tensor(0.3, requires_grad=True)
    flex = [c for c in natten.explain(x, x, x, 3, scale=scale).candidates if c.backend == "flex"]
    if x.device.type == "cpu":
        assert "gradients are wanted" in str(flex[0])


class Mutable:
    """An integer, and a number, that changes."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return int(self.value)

    def __float__(self):
        return float(self.value)


def test_arguments_are_remembered_by_value():
    x = torch.randn(1, 8, 2, 8)
    size, scale, stride = Mutable(3), Mutable(0.1), Mutable(1)
    parameter = torch.nn.Parameter(torch.tensor(0.1))
    pair = [3]
    for number, factor, step in ((3, 0.1, 1), (5, 0.4, 2), (4, 0.9, 3)):
        size.value, scale.value, stride.value, pair[0] = number, factor, step, number
        with torch.no_grad():
            parameter.fill_(factor)
        expected = natten.na1d(x, x, x, number, stride=step, scale=factor)
        for kernel_size in (size, [size], pair):
            for s in (scale, parameter, numpy.float64(factor)):
                found = natten.na1d(x, x, x, kernel_size, stride=(stride,), scale=s)
                assert_close(found, expected, 1e-6)


def test_numbers_of_numpy_are_planned_once(monkeypatch):
    x = torch.randn(1, 8, 2, 8)
    three = numpy.int64(3)
    natten.na1d(x, x, x, three, dilation=(numpy.int32(2),), scale=numpy.float32(0.5))
    monkeypatch.setattr("natten._dispatch.select", None)
    natten.na1d(x, x, x, numpy.int32(3), dilation=[numpy.int64(2)], scale=0.5)
