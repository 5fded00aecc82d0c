# SPDX-License-Identifier: MIT
"""Logits of any magnitude, and a processor that takes subnormal numbers for 0, in every kernel of this device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import natten
from tests import oracle
from tests.cases import Problem
from tests.policies import Policy, policies


@pytest.fixture(params=policies(), ids=str)
def policy(request):
    """Kernels of the table for this device."""
    if request.param.obstacle:
        pytest.skip(request.param.obstacle)
    return request.param


def call(problem: Problem, operands, backend):
    query, key, value, more_keys, more_values, rpb = operands
    return natten.neighborhood_attention_generic(
        query,
        key,
        value,
        additional_keys=more_keys,
        additional_values=more_values,
        rpb=rpb,
        return_lse=True,
        backend=backend,
        **problem.arguments(),
    )


def problem_of(grid, kernel_size, boundary="shift", **changes) -> Problem:
    rank = len(grid)
    whole = tuple((0, extent) for extent in grid)
    return Problem(
        grid=grid,
        kernel_size=kernel_size,
        stride=(1,) * rank,
        dilation=(1,) * rank,
        is_causal=(False,) * rank,
        boundary=(boundary,) * rank,
        offset=(0,) * rank,
        query_box=whole,
        key_box=whole,
        **changes,
    )


# Sliding and standing windows, boxes, windows of several chunks; every reason why a product is not compared as it is.
PROBLEMS = {
    "line": problem_of((300,), (151,), scale=0.5),
    "plane": problem_of((20, 40), (5, 7), scale=0.25, heads=2, heads_kv=1),
    "zeros": problem_of((9, 33), (5, 8), "zeros", scale=0.5, additional=5),
    "bias": problem_of((7, 6, 5), (3, 3, 2), scale=1.0, has_rpb=True),
    "turned": problem_of((40,), (40,), scale=-0.5, heads=2, heads_kv=1),
    "scaled": problem_of((12, 11), (5, 4), scale=4.0, additional=3, has_rpb=True),
}
# Powers of two in one row of logits, as far as the type goes: of float16, gradients are no larger than 2^16.
EXPONENTS = {torch.float16: (-3, 0, 2, 3, 4, 5)}
WIDE = (-3, 0, 3, 6, 8, 13, 27, 34, 40, 64, 100)


def mixed_operands(problem: Problem, dtype: torch.dtype):
    """Small integers, those of each key times a power of two of its own: products are exact in any order of summation."""
    exponents = torch.tensor(EXPONENTS.get(dtype, WIDE))

    def integers(like, largest):
        return None if like is None else torch.randint(-largest, largest + 1, like.shape).double()

    def spread(like):
        numbers = integers(like, 3)
        if numbers is None:
            return None
        # Of the keys that a query sees, few are of the largest kind, so that some rows have none.
        rare = torch.rand(*like.shape[:-1], 1) ** (2.0 * exponents.numel() / 6)
        return numbers * 2.0 ** exponents[(rare * exponents.numel()).long()]

    query, key, value, more_keys, more_values, rpb = problem.operands(dtype)
    exact = (
        integers(query, 2),
        spread(key),
        integers(value, 3),
        spread(more_keys),
        integers(more_values, 3),
        integers(rpb, 8),
    )
    wanted = (dtype, dtype, dtype, dtype, dtype, None if rpb is None else rpb.dtype)
    return [None if t is None else t.to(to) for t, to in zip(exact, wanted, strict=True)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_logits_of_mixed_magnitudes(name, policy):
    """The highest logit has weight 1 relative to itself, whatever stands beside it, and gradients know it as well.

    As softmax of the same float32 logits in float64, of which the true maximum was subtracted.
    """
    problem = PROBLEMS[name]
    operands = mixed_operands(problem, policy.dtype)
    logits_of = torch.float64 if policy.dtype == torch.float64 else torch.float32
    exact_operands = [None if t is None else t.double() for t in operands]

    def exact(*tensors):
        return oracle.dense(problem, tensors, torch.float64, logits_of=logits_of)

    output, lse = exact(*exact_operands)
    d_output = torch.randint(-3, 4, output.shape).double()
    d_lse = torch.randint(-3, 4, lse.shape).double()

    def gradients(function, tensors):
        inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
        results = function(*inputs)
        cotangents = [d_output.to(results[0]), d_lse.to(results[1])]
        present = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad(results, present, cotangents))
        return [t.detach() for t in results], [None if t is None else next(found) for t in inputs]

    _, expected = gradients(exact, exact_operands)
    results, found = gradients(lambda *t: call(problem, t, policy.backend), operands)

    eps = torch.finfo(policy.precision).eps
    oracle.assert_close(results[0], output, 8 * eps * 3, "output")
    # An LSE is relative to itself: a float holds no more digits of it.
    size = lse.abs().clamp(min=1).masked_fill(lse.isinf(), 1)
    rounding = 8 * torch.finfo(logits_of).eps if policy.precision == policy.dtype else eps
    oracle.assert_close(results[1].double() / size, lse / size, rounding, "lse")

    # Gradients are differences of products of order `order`: what is left of them, times a key, where its weight is not 0.
    order = (d_output.abs().amax() * 3 * problem.head_dim_value + 3).item()
    rounding = max(8 * eps, 2.0**-13)
    sizes = [None if t is None else t.abs() for t in exact_operands]
    inputs = [None if t is None else t.requires_grad_() for t in exact_operands]
    reach, _ = exact(inputs[0], inputs[1], sizes[1], inputs[3], sizes[3], inputs[5])
    weights = torch.autograd.grad(
        exact(*inputs)[0].sum(), [t for t in (inputs[2], inputs[4]) if t is not None]
    )
    of_key, of_more = weights[0].amax(-1, keepdim=True), weights[-1].amax(-1, keepdim=True)
    scale = abs(problem.scale_value)
    bounds = (
        scale * order * reach.detach().amax(-1, keepdim=True),
        scale * order * 2 * of_key,
        order * of_key,
        scale * order * 2 * of_more,
        order * of_more,
        order * math.prod(problem.grid) / 8,
    )
    for what, result, right, bound in zip(oracle.NAMES[2:], found, expected, bounds, strict=True):
        if right is not None:
            size = torch.as_tensor(bound).clamp(min=1e-3)
            oracle.assert_close(result.double() / size, right / size, rounding, what)


@pytest.mark.parametrize("masked", [slice(0, 200), slice(100, 300)], ids=["first", "last"])
def test_masked_keys(masked, policy):
    """A mask written into a channel: whole parts of a window hold nothing but keys far below the others."""
    problem = replace(PROBLEMS["line"], kernel_size=(299,), scale=1.0)
    query, key, value, *rest = mixed_operands(problem, policy.dtype)
    key.copy_(torch.randint(-3, 4, key.shape) * 2.0)
    query[..., 0] = 8
    key[..., 0] = torch.randint(8, 16, key.shape[:-1]).to(key)  # the highest logits are beyond 88
    lowest = 12 if policy.dtype == torch.float16 else 40
    powers = torch.randint(lowest - 6, lowest, (1, masked.stop - masked.start, 1)).double()
    key[:, masked, :, 0] = -(2.0**powers).to(key)
    exact = [t.double() for t in (query, key, value)]
    logits_of = torch.float64 if policy.dtype == torch.float64 else torch.float32
    output, lse = oracle.dense(problem, (*exact, *rest), torch.float64, logits_of=logits_of)
    assert lse.min() > 88
    results = call(problem, (query, key, value, *rest), policy.backend)
    eps = torch.finfo(policy.precision).eps
    oracle.assert_close(results[0], output, 8 * eps * 3, "output")
    oracle.assert_close(results[1], lse, max(1e-5, eps * lse.max().item()), "lse")


@pytest.mark.parametrize("boundary", ["shift", "zeros"])
def test_masks_of_any_size(boundary, policy):
    """Masks of -1e8 to -1e12, in channels of queries and keys, are those of -128: also where whole windows are masked.

    Gradients, too, of rows whose LSE is of ordinary size; of the others they are finite.
    """
    check_masks(boundary, policy)


CHANNELS = 8  # that hold a mask
MASKED_QUERY = 2.0**15  # with a small scale, so that float16 can hold gradients


def check_masks(boundary: str, policy: Policy) -> None:
    problem = problem_of(
        (5, 34), (3, 5), boundary, scale=2.0**-7, heads=2, additional=5, has_rpb=True
    )
    operands = problem.operands(policy.dtype)
    operands[0].mul_(32)
    operands[0][..., :CHANNELS] = MASKED_QUERY
    hidden = {i: torch.rand(operands[i].shape[:-1]) < 0.5 for i in (1, 3)}
    hidden[1][:, :, :12] = True  # windows of queries there see nothing else,
    hidden[3][..., 1] = True  # nor do those of one head see additional keys

    def masked(logit_of):
        """The operands with these logits of hidden keys, up to what the ordinary channels add."""
        result = list(operands)
        for i, where in hidden.items():
            logits = logit_of(where.shape) * where
            factor = CHANNELS * MASKED_QUERY * problem.scale_value
            result[i] = operands[i].clone()
            result[i][..., :CHANNELS] = (logits / factor)[..., None].to(policy.dtype)
        return result

    highest = 1 if policy.dtype == torch.float16 else 14  # which float16 can just hold
    huge = masked(lambda shape: -1.75 * 2.0 ** (26 + torch.randint(highest, shape)).double())
    modest = masked(lambda shape: torch.full(shape, -128.0).double())

    results = oracle.run(lambda *t: call(problem, t, policy.backend), huge)
    for what, result in zip(oracle.NAMES, results, strict=True):
        assert result.isfinite().all(), what

    wide = [None if t is None else t.double() for t in huge]
    logits_of = torch.float64 if policy.dtype == torch.float64 else torch.float32
    lse = oracle.dense(problem, wide, torch.float64, logits_of=logits_of)[1]
    is_ordinary = lse.abs() < 100
    assert 0.5 < is_ordinary.double().mean() < 1
    rounding = 8 * torch.finfo(policy.precision).eps
    size = lse.abs().clamp(min=16)
    oracle.assert_close(results[1].double() / size, lse / size, rounding, "lse")

    def ordinary(function):
        def rows(*tensors):
            output, lse = function(*tensors)
            return output.where(is_ordinary[..., None], 0), lse.where(is_ordinary, 0)

        return rows

    compared = (
        oracle.run(ordinary(lambda *t: call(problem, t, policy.backend)), huge),
        oracle.run(ordinary(lambda *t: oracle.dense(problem, t)), wide),
        oracle.run(ordinary(lambda *t: oracle.dense(problem, t, policy.precision)), modest),
    )
    for found in compared:
        for i in (3, 5):  # whose masked channels are times a large query
            found[i] = found[i][..., CHANNELS:]
    oracle.assert_as_good_as_dense(*compared, policy.precision)


@pytest.mark.parametrize("policy", policies(op="qk"), ids=str)
def test_unfused_logits_of_mixed_magnitudes(policy):
    """Weights are products of one key each, and a sum over values has weights of 0 for all but the highest logits."""
    if policy.obstacle:
        pytest.skip(policy.obstacle)
    problem = PROBLEMS["plane"]
    query, key, value, *rest = mixed_operands(problem, policy.dtype)
    exact = [t.double() for t in (query, key, value)]
    expected, _ = oracle.dense(problem, (*exact, *rest), torch.float64)
    key, value = (t.repeat_interleave(2, -2).movedim(-2, 1) for t in (key, value))
    query = query.movedim(-2, 1) * problem.scale
    weights = natten.functional.na2d_qk(query, key, problem.kernel_size, backend=policy.backend)
    weights = weights.double().softmax(-1).to(policy.dtype)
    output = natten.functional.na2d_av(weights, value, problem.kernel_size, backend=policy.backend)
    eps = torch.finfo(policy.precision).eps
    oracle.assert_close(output.movedim(1, -2), expected, 8 * eps * 3, "output")


@contextmanager
def subnormals_are_zero() -> Iterator[None]:
    """On this thread, the only one that tests run on."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot take subnormal numbers for 0")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# Windows that begin at one token, where a packed number is broadcast, and others; head dims that leave a word half empty.
FLUSHED = {
    "line": problem_of((50,), (50,), head_dim=17, head_dim_value=9, additional=3),
    "plane": problem_of((6, 20), (5, 20), head_dim=16, head_dim_value=5, heads_kv=1),
    "wide": problem_of((3, 5, 18), (3, 3, 35), "mask", head_dim=7, head_dim_value=31),
    "slide": problem_of((9, 40), (3, 6), "zeros", head_dim=33, head_dim_value=3, has_rpb=True),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", FLUSHED)
def test_flush_denormal(name, policy):
    """Two numbers of 16 bits in a word are no float, which may be subnormal if one of them is 0."""
    problem = FLUSHED[name]
    operands = [
        t if t is None or i == 5 else t.relu()  # every other number is 0
        for i, t in enumerate(problem.operands(policy.dtype))
    ]
    exact = oracle.run(
        lambda *t: oracle.dense(problem, t), [None if t is None else t.double() for t in operands]
    )
    lossy = oracle.run(lambda *t: oracle.dense(problem, t, policy.precision), operands)
    with subnormals_are_zero():
        results = oracle.run(lambda *t: call(problem, t, policy.backend), operands)
    oracle.assert_as_good_as_dense(results, exact, lossy, policy.precision)


@pytest.mark.parametrize("name", FLUSHED)
def test_infinite_key(name, policy):
    """A key with logits of -inf weighs nothing. Two of its numbers, taken for a float, are a NaN that arithmetic would change."""
    problem = FLUSHED[name]
    operands = problem.operands(policy.dtype)
    query, key, *_ = operands
    query[..., 1] = query[..., 1].abs() + 0.5
    key[(0, *(extent // 2 for extent in problem.grid), slice(None), 1)] = -math.inf
    exact = [None if t is None else t.double() for t in operands]
    results = call(problem, operands, policy.backend)
    for what, result, right, lossy in zip(
        oracle.NAMES,
        results,
        oracle.dense(problem, exact),
        oracle.dense(problem, operands, policy.precision),
        strict=False,
    ):
        error = (lossy.double() - right).abs().max().item()
        floor = oracle.FLOOR[policy.precision] * torch.finfo(policy.precision).eps
        oracle.assert_close(result, right, 2 * error + floor * right.abs().max().item(), what)


@pytest.mark.cpu
def test_subnormal_halves(policy):
    """The smallest numbers of float16 are ordinary ones of float32, in which sums are made."""
    if policy.dtype != torch.float16:
        pytest.skip("of float16 only")
    problem = FLUSHED["wide"]
    query, key, value, *rest = problem.operands(policy.dtype)
    value = (value.double() * 2.0**-16).half()
    operands = (query, key, value, *rest)
    expected, _ = oracle.dense(problem, [None if t is None else t.double() for t in operands])
    with subnormals_are_zero():
        output, _ = call(problem, operands, policy.backend)
    assert (expected.abs() < 2.0**-14).double().mean() > 0.9
    oracle.assert_close(output, expected, 2.0**-24, "output")


def test_products_beyond_the_largest_float(policy):
    """As in torch's own attention: NaN in rows that see a logit of +inf, no weight for one of -inf."""
    if policy.dtype == torch.float16:
        pytest.skip("its products are no larger than 2^40")
    problem = problem_of((7, 30), (3, 7), head_dim=4, head_dim_value=4, scale=1.0)
    operands = problem.operands(policy.dtype)
    query, key, *_ = operands
    largest = torch.finfo(policy.dtype).max
    query[..., 0], key[..., 0] = 2, 0
    key[0, 2, 20, :, 0], key[0, 5, 8, :, 0] = largest, -largest
    products_of = torch.float64 if policy.dtype == torch.float64 else torch.float32
    expected = oracle.dense(problem, operands, products_of)
    assert 0 < expected[0].isnan().double().mean() < 0.2
    rounding = 8 * torch.finfo(policy.precision).eps
    for name, result, right in zip(
        oracle.NAMES, call(problem, operands, policy.backend), expected, strict=False
    ):
        largest = right[right.isfinite()].abs().max().item()
        oracle.assert_close(result, right, rounding * largest, name)


MISSING = (2**27 + 5, 3)  # whose cube is beyond 64 bits, or small


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["reference", "naive", "fna", "flex"])
@pytest.mark.parametrize("kernel_size", MISSING, ids=str)
def test_missing_keys(kernel_size, backend):
    """With boundary "zeros", all keys that are not there count, however many they are."""
    check_missing_keys(kernel_size, backend)


def check_missing_keys(kernel_size: int, backend: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 3, 2, 1, 16).unbind()
    output, lse = natten.na3d(
        query, key, value, kernel_size, boundary="zeros", return_lse=True, backend=backend
    )
    logits = (query.double() * 16**-0.5).flatten(1, 3)[:, :, 0] @ key.double().flatten(1, 3)[
        :, :, 0
    ].mT
    attends, _, missing = oracle.mask(problem_of((2, 3, 2), (3,) * 3, "zeros"))
    if kernel_size > 3:
        attends = torch.ones_like(attends)
        missing = torch.full((12,), float(kernel_size**3 - 12), dtype=torch.float64)
    weights = logits.exp() * attends
    total = weights.sum(-1) + missing
    expected = weights / total[..., None] @ value.double().flatten(1, 3)[:, :, 0]
    oracle.assert_close(lse.flatten(), total.log().flatten(), 1e-5, "lse")
    oracle.assert_close(output.flatten() * missing.max(), expected.flatten() * missing.max(), 1e-3)
