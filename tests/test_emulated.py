# SPDX-License-Identifier: MIT
"""The CUDA kernels from Python, through the whole stack, on the CPU: `make emulation` builds them for it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import natten
from natten import _C
from tests import oracle
from tests.cases import random_problem
from tests.policies import EMULATION, emulated_policies
from tests.test_kernels import call, check, check_poison, expectation
from tests.test_magnitudes import MISSING, check_masks, check_missing_keys

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not EMULATION.exists(), reason="needs `make emulation`"),
]
POLICIES = {str(policy): policy for policy in emulated_policies()}
FUSED = [name for name in POLICIES if name.startswith("fna")]

# Every feature; tests/emulation has the kernels alone, on many more problems.
FEATURES = [
    ("rank1", "causal", "strided", "additional"),
    ("rank2", "stride", "even", "gqa", "batch"),
    ("rank2", "dilation", "rpb", "value_dim"),
    ("rank3", "zeros", "causal", "scale"),
    ("rank2", "boxes", "mask", "additional", "rpb"),
    ("rank2", "valid", "offset", "stride"),
    ("rank1", "huge", "whole", "gqa"),
]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_features(features, name):
    """Forward and gradients, of LSE and bias too, against the reference in float64."""
    check(random_problem(features, 0), POLICIES[name])


@pytest.mark.parametrize("head_dim", [7, 33, 80, 200])
def test_head_dims(head_dim):
    problem = random_problem(("rank2", "additional", "rpb"), 3)
    problem = replace(problem, head_dim=head_dim, head_dim_value=head_dim + 3, magnitude=1.0)
    check(problem, POLICIES["fna-Sm80-float16"])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions(rank, name):
    """na1d, na2d and na3d, in grids of many tiles."""
    policy = POLICIES[name]
    grid, kernel_size = (((300,), (33,)), ((33, 35), (7, 9)), ((6, 12, 13), (3, 4, 5)))[rank - 1]
    function = (natten.na1d, natten.na2d, natten.na3d)[rank - 1]
    query, key, value = torch.randn(3, 1, *grid, 1, 32).to(policy.dtype).unbind()
    output, lse = function(query, key, value, kernel_size, backend=policy.backend, return_lse=True)
    doubles = (t.double() for t in (query, key, value))
    expected, expected_lse = function(*doubles, kernel_size, backend="reference", return_lse=True)
    rounding = 4 * torch.finfo(policy.precision).eps
    oracle.assert_close(output, expected, max(rounding, 1e-5) * expected.abs().max().item())
    bound = 1e-5 if policy.precision == policy.dtype else rounding
    oracle.assert_close(lse, expected_lse, bound * expected_lse.abs().max().item())


@pytest.mark.parametrize("which", ["query", "key", "value", "d_output"])
def test_poison_stays_where_it_belongs(which):
    policy = POLICIES["naive-naive-float32"]
    check_poison(policy.backend, policy.dtype, float("nan"), which, (4, 5))


@pytest.mark.parametrize("scale", [0.0, -0.4])
@pytest.mark.parametrize("name", FUSED)
def test_scales_that_are_not_positive(name, scale):
    """Where a masked logit of -inf must not be multiplied."""
    problem = replace(random_problem(("rank2", "scale"), 0), scale=scale, magnitude=1.0)
    check(replace(problem, has_rpb=False), POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_masks(name):
    """Logits of -1e8 to -1e12 beside ordinary ones, of additional keys and biased ones, too."""
    check_masks("shift", POLICIES[name])


@pytest.mark.parametrize("kernel_size", MISSING, ids=str)
@pytest.mark.parametrize("backend", ["naive:naive", "fna:Sm50", "fna:Sm80Simt"])
def test_missing_keys(backend, kernel_size):
    """With boundary "zeros"."""
    check_missing_keys(kernel_size, backend)


@pytest.fixture
def half():
    return POLICIES["fna-Sm80-float16"].backend


def test_tile_shapes(half):
    """Results are those of other tiles but for the order of sums."""
    x = torch.randn(1, 20, 22, 1, 32).half().requires_grad_()

    def run(**tiles):
        output = natten.na2d(x, x, x, (5, 7), backend=half, **tiles)
        return output, torch.autograd.grad(output.float().square().sum(), x)[0]

    plain = run()
    for q, kv in (((2, 32), (16, 4)), ((64, 1), (1, 64))):
        tiles = {"q_tile_shape": q, "kv_tile_shape": kv}
        tiled = run(**tiles, backward_q_tile_shape=kv, backward_kv_tile_shape=q)
        for result, expected in zip(tiled, plain, strict=True):
            oracle.assert_close(result, expected, 4e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["fna-Sm80-float16", "fna-Sm50-float32", "naive-naive-float32"])
def test_bitwise_repeatable(name, monkeypatch):
    """Whatever order the threads of a block run in, and however many blocks at a time."""
    policy = POLICIES[name]
    problem = replace(random_problem(("rank2", "gqa", "rpb", "additional"), 3), head_dim=16)
    operands = replace(problem, head_dim_value=24).operands(policy.dtype)
    runs = []
    for seed, threads in ((1, 1), (2, 2)):
        monkeypatch.setenv("NATTEN_EMULATION_SEED", str(seed))
        monkeypatch.setenv("NATTEN_EMULATION_THREADS", str(threads))
        runs.append(oracle.run(lambda *t: call(problem, t, policy.backend), operands))
    for what, first, second in zip(oracle.NAMES, *runs, strict=True):
        assert torch.equal(first, second), what


def test_dense_attention_and_modules(half):
    x = torch.randn(2, 40, 2, 32).half()
    output = natten.attention(x, x, x, is_causal=True, backend=half)
    exact = natten.attention(*(x.double(),) * 3, is_causal=True, backend="reference")
    oracle.assert_close(output, exact, 4e-3)
    module = natten.NeighborhoodAttention2D(64, 2, 5, rel_pos_bias=True).half()
    right = copy.deepcopy(module).double()
    tokens = torch.randn(1, 9, 10, 64).half()
    for name, layer in ((half, module), ("reference", right)):
        with natten.use_backend(name):
            layer(tokens.to(layer.qkv.weight)).sum().backward()
    for (name, parameter), exact in zip(module.named_parameters(), right.parameters(), strict=True):
        bound = 2e-2 * exact.grad.abs().max().item()
        oracle.assert_close(parameter.grad, exact.grad, bound, name)


def test_a_wrong_launch_is_noticed(half, monkeypatch):
    """Tests the tests: a kernel that reads keys one token away fails `check`."""
    problem = replace(random_problem(("rank1", "batch"), 0), head_dim=32, head_dim_value=32)
    policy = POLICIES["fna-Sm80-float16"]
    check(problem, policy)
    original = _C.forward

    def mutated(core, kernel, query, key, *rest):
        one_token_on = key[0] + 2 * key[2][-1]
        original(core, kernel, query, (one_token_on, *key[1:]), *rest)

    monkeypatch.setattr(_C, "forward", mutated)
    exact, lossy = expectation(problem, policy.dtype, policy.precision)
    longer = [None if t is None else torch.cat([t, t[:1]]) for t in problem.operands(policy.dtype)]
    views = [None if t is None else t[:-1] for t in longer]
    results = oracle.run(lambda *t: call(problem, t, half), views)
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_as_good_as_dense(results, exact, lossy, policy.precision)
