# SPDX-License-Identifier: MIT
"""Every policy of the kernel table for this device, forced, against the reference in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

import natten
from bench.cases import Case
from natten import _C
from tests import oracle
from tests.cases import FEATURES, NAMED, PAIRS, Problem, named_problem, random_problem
from tests.policies import Policy, policies

POLICIES = policies()


@functools.cache
def expectation(problem: Problem, dtype: torch.dtype, precision: torch.dtype):
    """What is right, from the reference in float64, and what a dense computation makes of it in `precision`."""
    operands = problem.operands(dtype)
    exact = oracle.run(
        lambda *t: call(problem, t, "reference"),
        [None if t is None else t.double() for t in operands],
    )
    return exact, oracle.run(lambda *t: oracle.dense(problem, t, precision), operands)


def call(problem: Problem, operands, backend=None):
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


@pytest.fixture(params=POLICIES, ids=str)
def policy(request):
    """Kernels of the table for this device."""
    if request.param.obstacle:
        pytest.skip(request.param.obstacle)
    return request.param


def check(problem: Problem, policy: Policy) -> None:
    """The policy's kernels, forced, against the reference; head dims are cut to what they hold."""
    problem = replace(
        problem,
        head_dim=min(problem.head_dim, policy.max_head_dim),
        head_dim_value=min(problem.head_dim_value, policy.max_head_dim),
    )
    operands = problem.operands(policy.dtype)
    selected = natten.explain(
        *operands[:3],
        backend=policy.backend,
        additional_keys=operands[3],
        additional_values=operands[4],
        rpb=operands[5],
        **problem.arguments(),
    ).selected
    assert selected.kernel in policy.kernels
    exact, lossy = expectation(problem, policy.dtype, policy.precision)
    results = oracle.run(lambda *t: call(problem, t, policy.backend), operands)
    oracle.assert_as_good_as_dense(results, exact, lossy, policy.precision)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, policy):
    check(random_problem((feature,), 0), policy)


# All pairs in float32; a third of them in the other types, not the same third for each policy.
PAIRS_OF_POLICIES = [
    pytest.param(pair, policy, id=f"{'-'.join(pair)}-{policy}")
    for i, pair in enumerate(PAIRS)
    for j, policy in enumerate(POLICIES)
    if policy.dtype == torch.float32 or i % 3 == j % 3
]


@pytest.mark.parametrize(("pair", "policy"), PAIRS_OF_POLICIES, indirect=["policy"])
def test_pair_of_features(pair, policy):
    check(random_problem(pair, 1), policy)


@pytest.mark.parametrize("seed", range(12))
def test_anything_by_several_threads(seed, policy):
    torch.set_num_threads(2 + seed % 2)
    check(random_problem((), seed), policy)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_anything_large(rank, seed, policy):
    check(random_problem((f"rank{rank}",), seed, large=True), policy)


# So large that the sums of what a step sees do not fit a thread's memory: in one pass for all gradients, a grid is cut into
# blocks that overlap.
WIDE = {
    "line": named_problem(Case("", (1500,), (9,), heads=1), seed=0),
    "bias, causal": named_problem(
        Case("", (5, 260), (3, 4), heads=1), is_causal=(False, True), has_rpb=True, seed=1
    ),
    "grouped queries, dilation, zeros": named_problem(
        Case("", (4, 340), (3, 5), heads=2),
        heads_kv=1,
        dilation=(1, 2),
        boundary=("mask", "zeros"),
        seed=2,
    ),
    "rank 3, boxes": named_problem(
        Case("", (4, 6, 60), (3, 3, 3), heads=1),
        query_box=((0, 4), (0, 6), (7, 50)),
        key_box=((0, 4), (0, 6), (6, 52)),
        boundary=("shift", "shift", "mask"),
        has_rpb=True,
        seed=3,
    ),
}


@functools.cache
def wide_expectation(name):
    problem = replace(WIDE[name], head_dim=512, head_dim_value=500)
    operands = problem.operands(torch.float32)
    exact = oracle.run(lambda *t: oracle.dense(problem, t, torch.float64), operands)
    return problem, operands, exact


@pytest.mark.cpu
@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("name", WIDE)
def test_wide(name, isa):
    torch.set_num_threads(2)
    problem, operands, exact = wide_expectation(name)
    results = oracle.run(lambda *t: call(problem, t, f"fna:{isa}"), operands)
    for what, result, right in zip(oracle.NAMES, results, exact, strict=True):
        if right is not None:
            oracle.assert_close(result, right, 2e-5 * right.abs().max().item(), what)


@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_named_problem(case, dtype):
    """The benchmark's problems at full extent, as the best kernel of this machine computes them."""
    torch.set_num_threads(2)
    problem = named_problem(case, heads=1, heads_kv=1, head_dim=16, head_dim_value=16)
    operands = problem.operands(dtype)
    exact = oracle.run(
        lambda *t: call(problem, t, "reference"),
        [None if t is None else t.float() for t in operands],
    )
    results = oracle.run(lambda *t: call(problem, t), operands)
    for name, result, right in zip(oracle.NAMES, results, exact, strict=True):
        if right is not None:
            bound = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype] * right.abs().max().item()
            oracle.assert_close(result, right, bound, name)


# On a CPU, the large ones on the best instruction set only.
LIMITED = {f"fna:{isa}" for isa in _C.cpu_isas()[1:]}
HEAD_DIMS_OF_POLICIES = [
    pytest.param(head_dim, policy, id=f"{head_dim}-{policy}")
    for head_dim in (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 160, 256, 511, 512)
    for policy in POLICIES
    if head_dim <= (64 if policy.backend in LIMITED else policy.max_head_dim)
]


@pytest.mark.parametrize(("head_dim", "policy"), HEAD_DIMS_OF_POLICIES, indirect=["policy"])
def test_head_dim(head_dim, policy):
    problem = replace(
        random_problem(("rank2", "rpb", "additional"), 5),
        head_dim=head_dim,
        head_dim_value=max(1, 512 - head_dim) if head_dim % 2 else head_dim,
        magnitude=1.0,
    )
    check(problem, policy)


def test_beyond_the_largest_head_dim():
    """No fused kernel goes there; the naive ones go anywhere."""
    x = torch.randn(1, 9, 1, 700)
    assert natten.explain(x, x, x, kernel_size=3).selected.backend == "naive"
    expected = natten.na1d(x.double(), x.double(), x.double(), 3, backend="reference")
    oracle.assert_close(natten.na1d(x, x, x, 3), expected, 1e-5)


def test_huge_logits(policy):
    problem = replace(random_problem(("rank2", "zeros"), 11), magnitude=1e4, scale=1.0, head_dim=16)
    operands = problem.operands(policy.dtype)
    output, lse = call(problem, operands, policy.backend)
    assert output.isfinite().all()
    _, expected_lse = call(
        problem, [None if t is None else t.double() for t in operands], "reference"
    )
    largest = expected_lse[expected_lse.isfinite()].abs().max().item()
    rounding = 1e-5 if policy.precision == policy.dtype else torch.finfo(policy.precision).eps
    oracle.assert_close(lse, expected_lse, rounding * largest, "lse")


@pytest.mark.parametrize(
    ("grid", "kernel_size"), [((300,), 151), ((30, 10), (15, 7)), ((30, 40), (15, 9))]
)
@pytest.mark.parametrize("slope", [2.0, -2.0, 0.5, 0.25])
def test_logits_that_rise_along_an_axis(slope, grid, kernel_size, policy):
    """Weights are relative to some logit seen before, which those seen later may leave far behind."""
    query, key, value = torch.randn(3, 2, *grid, 2, 16).to(policy.dtype).unbind()
    query[..., 0] = 1
    rise = slope * (300 / grid[0]) * (torch.arange(grid[0]) - grid[0] // 2)
    key[..., 0] = rise.to(policy.dtype).view(-1, *(1,) * len(grid))
    # Some queries are far from the first logits in the other direction, or have all logits below them.
    query[:, ::7] *= -1
    # Values that a large weight would make overflow, where the type has them.
    size = 1.0 if policy.dtype == torch.float16 else 2.0**100
    value *= size

    def attend(backend, *tensors):
        attention = natten.na1d if len(grid) == 1 else natten.na2d
        return attention(*tensors, kernel_size, scale=1.0, return_lse=True, backend=backend)

    expected = attend("reference", query.double(), key.double(), value.double())
    rounding = max(torch.finfo(policy.precision).eps, 1e-6)
    for name, result, right in zip(
        ("output", "lse"), attend(policy.backend, query, key, value), expected, strict=True
    ):
        # Logits, and with them weights, are rounded in proportion to their size.
        unit = size if name == "output" else 1.0
        tolerance = 20 * rounding * right.abs().max().item() / unit + 4e-4
        oracle.assert_close(result / unit, right / unit, tolerance, name)


def test_bitwise_repeatable(policy):
    """Forward and backward are deterministic: on another number of threads, too, where that cuts the work in the same items."""
    problem = random_problem(("rank2", "gqa", "rpb", "additional"), 3)
    operands = problem.operands(policy.dtype)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(oracle.run(lambda *t: call(problem, t, policy.backend), operands))
    for name, *results in zip(oracle.NAMES, *runs, strict=True):
        for result in results[1:]:
            assert (result is None) == (results[0] is None)
            assert result is None or torch.equal(result, results[0]), name


POISONS = pytest.mark.parametrize(
    ("poison", "which", "place"),
    list(
        itertools.product(
            (float("nan"), float("inf")), ("query", "key", "value", "d_output"), ((4, 5), (0, 0))
        )
    ),
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)


@pytest.mark.parametrize("width", [10, 40])
@POISONS
def test_poison_stays_where_it_belongs(poison, which, place, width, policy):
    if policy.multiplies_tiles:
        pytest.skip("its products take whole tiles, in which 0 times NaN is NaN")
    check_poison(policy.backend, policy.dtype, poison, which, place, width)


@POISONS
def test_poison_stays_where_it_belongs_in_the_reference(poison, which, place):
    check_poison("reference", torch.float64, poison, which, place)


def check_poison(backend, dtype, poison, which, place, width=10):
    """A NaN or inf reaches only what attends to it, forward and backward."""
    problem = Problem(
        grid=(9, width),
        kernel_size=(3, 4),
        stride=(1, 2),
        dilation=(2, 1),
        is_causal=(False, False),
        boundary=("shift", "mask"),
        offset=(0, 0),
        query_box=((0, 9), (0, width)),
        key_box=((0, 9), (0, width)),
        heads=1,
        heads_kv=1,
    )
    flat = place[0] * width + place[1]
    attends, _, _ = oracle.mask(problem)
    tensors = dict(zip(("query", "key", "value"), problem.operands(dtype), strict=False))
    cotangent = torch.randn(1, 9, width, 1, 16).to(dtype)

    def run():
        inputs = [t.detach().requires_grad_() for t in tensors.values()]
        output, lse = call(problem, (*inputs, None, None, None), backend)
        gradients = torch.autograd.grad(output, inputs, cotangent)
        return [t.detach().flatten(1, 2)[0] for t in (output, lse, *gradients)]

    clean = run()
    poisoned = tensors.get(which, cotangent)
    poisoned[0, place[0], place[1], 0, 3] = poison
    dirty = run()
    # Queries that see the poison; then the keys that see such a query.
    queries = torch.zeros(9 * width, dtype=torch.bool)
    if which in ("query", "d_output"):
        queries[flat] = True
    else:
        queries = attends[:, flat].clone()
    keys = attends[queries].any(0)
    forward = queries if which != "d_output" else torch.zeros_like(queries)
    for name, before, after, may in zip(
        ("output", "lse", "d_query", "d_key", "d_value"),
        clean,
        dirty,
        (forward, forward, queries, keys, keys),
        strict=True,
    ):
        # The fused kernels sum in another order where they meet a NaN: equal but for rounding.
        rounding = 16 * torch.finfo(before.dtype).eps * before[before.isfinite()].abs().max().item()
        oracle.assert_close(after[~may], before[~may].double(), rounding, f"{name} beside {which}")
    if which == "value":
        assert not dirty[0][queries][..., 3].isfinite().any()


def test_poison_stays_where_it_belongs_on_a_long_line(policy):
    """Windows that kernels take in several parts."""
    if policy.multiplies_tiles:
        pytest.skip("its products take whole tiles, in which 0 times NaN is NaN")
    query, key, value = torch.randn(3, 1, 600, 1, 16).to(policy.dtype).unbind()
    clean = natten.na1d(query, key, value, 301, backend=policy.backend)
    value[0, 20] = float("inf")
    dirty = natten.na1d(query, key, value, 301, backend=policy.backend)
    seeing = slice(0, 20 + 150 + 1)
    assert not dirty[:, seeing].isfinite().any()
    rounding = 16 * torch.finfo(policy.precision).eps * clean.abs().max().item()
    oracle.assert_close(dirty[:, 171:], clean[:, 171:].double(), rounding, "output")


@pytest.mark.parametrize("which", ["query", "key", "value", "d_output"])
def test_poison_in_any_channel_is_found(which, policy):
    """Kernels look for it a vector at a time: what they overlook reaches tokens that do not attend to it."""
    if policy.multiplies_tiles:
        pytest.skip("its products take whole tiles, in which 0 times NaN is NaN")
    shape = (1, 3, 40, 1, 40)
    tensors = {name: torch.randn(shape).to(policy.dtype) for name in ("query", "key", "value")}
    cotangent = torch.randn(shape).to(policy.dtype)

    def run():
        inputs = [t.detach().requires_grad_() for t in tensors.values()]
        output = natten.na2d(*inputs, (3, 5), backend=policy.backend)
        return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]

    clean = run()
    token = tensors.get(which, cotangent)[0, 1, 20, 0]
    # How far from it there are queries that see it, and keys that these see.
    of_queries = 2 if which in ("key", "value") else 0
    of_keys = of_queries + 2
    reaches = (of_queries, of_queries, of_keys, of_keys)
    for channel in range(40):
        held = token[channel].clone()
        token[channel] = float("inf")
        for before, after, reach in zip(clean, run(), reaches, strict=True):
            beside = (torch.arange(40) - 20).abs() > reach
            rounding = 16 * torch.finfo(before.dtype).eps * before.abs().max().item()
            expected = before[:, :, beside].double()
            said = f"beside channel {channel}"
            oracle.assert_close(after[:, :, beside], expected, rounding, said)
        token[channel] = held


@pytest.fixture
def memory_is_poisoned():
    """New tensors hold NaN: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("memory_is_poisoned")
@pytest.mark.parametrize("corner", [(0, 0), (8, 0), (0, 24), (13, 31)], ids=str)
def test_keys_that_nobody_attends_to_have_no_gradient(corner, policy):
    """Queries are a part of the grid, keys all of it: kernels that follow the queries do not come by some keys."""
    grid, size = (24, 48), (11, 17)
    query = torch.randn(1, *size, 2, 16).to(policy.dtype).requires_grad_()
    key, value = (torch.randn(1, *grid, 2, 16).to(policy.dtype).requires_grad_() for _ in range(2))
    arguments = {"kernel_size": 5, "grid": grid, "query_origin": corner}
    output = natten.na2d(query, key, value, **arguments, backend=policy.backend)
    d_output = torch.randn_like(output)
    results = torch.autograd.grad(output, (query, key, value), d_output)
    exact_inputs = [t.detach().double().requires_grad_() for t in (query, key, value)]
    exact = natten.na2d(*exact_inputs, **arguments, backend="reference")
    expected = torch.autograd.grad(exact, exact_inputs, d_output.double())
    # Weights and gradients are of order 1, and a key has at most 25 queries.
    rounding = 16 * torch.finfo(policy.precision).eps * 5
    for name, result, wanted in zip(("query", "key", "value"), results, expected, strict=True):
        oracle.assert_close(result, wanted, rounding, f"gradient of {name}")
        assert (result[wanted == 0] == 0).all(), name
    assert (expected[1] == 0).all(-1).any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_kernel_is_noticed(which, monkeypatch):
    """Tests the tests: keys read one token away, query and key exchanged, one number of the output changed."""
    original = _C.forward

    def mutated(problem, kernel, query, key, value, *rest):
        if which == 0:
            key = (key[0] + key[2][0] * 4, *key[1:])
        if which == 1:
            query, key = key, query
        original(problem, kernel, query, key, value, *rest)

    problem = named_problem(NAMED[0], grid=(30,), kernel_size=(5,), batch=2)
    problem = replace(
        problem,
        stride=(1,),
        dilation=(1,),
        is_causal=(False,),
        boundary=("shift",),
        offset=(0,),
        query_box=((0, 30),),
        key_box=((0, 30),),
    )
    operands = problem.operands(torch.float32)
    exact, lossy = expectation(problem, torch.float32, torch.float32)
    results = oracle.run(lambda *t: call(problem, t), operands)
    oracle.assert_as_good_as_dense(results, exact, lossy, torch.float32)
    if which == 2:
        results[0][1, 17, 1, 3] += 1e-4
    else:
        monkeypatch.setattr(_C, "forward", mutated)
        # A third sample behind them, so that what the mutants read is still memory of ours.
        longer = [None if t is None else torch.cat([t, t[:1]]) for t in operands]
        views = [None if t is None else t[:2] for t in longer]
        results = oracle.run(lambda *t: call(problem, t), views)
    with pytest.raises(AssertionError, match=r"off by"):
        oracle.assert_as_good_as_dense(results, exact, lossy, torch.float32)
