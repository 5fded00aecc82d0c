# SPDX-License-Identifier: MIT
"""The reference, which all other tests trust, against a dense mask built by brute force."""

from __future__ import annotations

import pytest
import torch

import natten
from natten import reference
from natten._problem import Operands, normalize
from tests import oracle
from tests.cases import FEATURES, PAIRS, Problem, random_problem


def as_function(problem: Problem):
    """The reference, as a function of the operands: plain differentiable torch."""

    def function(*operands):
        operands = Operands(*operands)
        settings = {"grid": None, "query_origin": None, "key_origin": None, **problem.arguments()}
        normalized = normalize(operands.describe(), None, **settings)
        query = operands.query
        for dim, start, length in normalized.narrowing:
            query = query.narrow(dim, start, length)
        return reference.forward(
            operands._replace(query=query), normalized.flat_axes, normalized.scale
        )

    return function


def check(problem: Problem) -> None:
    operands = problem.operands(torch.float64)
    expected = oracle.run(lambda *t: oracle.dense(problem, t), operands)
    for function in (
        as_function(problem),
        lambda *t: natten.neighborhood_attention_generic(
            *t[:3],
            additional_keys=t[3],
            additional_values=t[4],
            rpb=t[5],
            return_lse=True,
            backend="reference",
            **problem.arguments(),
        ),
    ):
        results = oracle.run(function, operands)
        for name, result, exact in zip(oracle.NAMES, results, expected, strict=True):
            assert (result is None) == (exact is None), name
            if exact is not None:
                finite = exact[exact.isfinite()]
                largest = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
                oracle.assert_close(result, exact, 1e-11 * largest, name)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("seed", range(3))
def test_feature(feature, seed):
    check(random_problem((feature,), seed))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair_of_features(pair):
    check(random_problem(pair, 0))


def test_chunks_do_not_matter(monkeypatch):
    problem = random_problem(("rank2", "zeros", "additional", "rpb", "gqa"), 7)
    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 1)
    check(problem)


def test_memory_does_not_grow_with_the_grid(monkeypatch):
    """Of L x L, or of all windows at once, nothing is ever in memory."""
    largest = 0
    original = torch.Tensor.masked_fill

    def spy(tensor, *arguments):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return original(tensor, *arguments)

    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 1 << 16)
    monkeypatch.setattr(torch.Tensor, "masked_fill", spy)
    x = torch.randn(1, 8192, 1, 16)
    natten.na1d(x, x, x, 65, backend="reference")
    assert 0 < largest <= 1 << 16


@pytest.mark.parametrize(
    "features", [("zeros", "rpb"), ("causal", "additional"), ("gqa", "stride")]
)
def test_any_order_of_derivatives(features):
    problem = random_problem(features, 1)
    problem = type(problem)(
        **{**vars(problem), "batch": 1, "heads": 2, "heads_kv": 1, "head_dim": 2}
    )
    from dataclasses import replace

    small = replace(
        problem,
        grid=(4,),
        kernel_size=(2,),
        stride=(1,),
        dilation=(1,),
        is_causal=problem.is_causal[:1],
        boundary=("zeros",) if "zeros" in features else ("mask",),
        offset=(0,),
        query_box=((0, 4),),
        key_box=((0, 4),),
        head_dim_value=1,
        additional=min(problem.additional, 2),
        magnitude=1.0,
        scale=None,
    )
    operands = [None if t is None else t.requires_grad_() for t in small.operands(torch.float64)]
    present = [t for t in operands if t is not None]

    def function(*tensors):
        given = iter(tensors)
        output, lse = as_function(small)(*(None if t is None else next(given) for t in operands))
        return output, lse

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present)
