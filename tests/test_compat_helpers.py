# SPDX-License-Identifier: MIT
"""Helpers of the older API: the extension module of 0.17, and natten.utils."""

from __future__ import annotations

import importlib
import math
import unittest

import pytest
import torch

import natten
from natten import libnatten
from natten.utils import checks
from tests import oracle, oracle_unfused
from tests.oracle import assert_close
from tests.test_compat import GRIDS, leaves, plain

pytestmark = pytest.mark.cpu

# natten.libnatten ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_extension_module_of_0_17(rank):
    problem = plain(GRIDS[str(rank)], 3, 2, is_causal=(True, *(False,) * (rank - 1)))
    settings = (problem.kernel_size, problem.dilation, problem.is_causal)

    def written(name, results, *rest):
        results = [torch.full_like(t, math.nan) for t in results]
        getattr(libnatten, f"na{rank}d_{name}")(*results, *rest)
        return results

    query, key, value = leaves(*problem.operands(torch.float64)[:3])
    expected, expected_lse = oracle.dense(problem, (query, key, value, None, None, None))
    scale, tiles = 5**-0.5, ((8,) * rank, (8,) * rank)
    output, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    forward = getattr(libnatten, f"na{rank}d_forward")
    with torch.no_grad():
        forward(output, query, key, value, None, lse, *settings, scale, *tiles)
    assert_close(output, expected, 1e-12)
    assert_close(lse, expected_lse, 1e-12)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (query, key, value), cotangent)
    tensors = (query, key, value, output, cotangent, lse)
    with torch.no_grad():
        given = written(
            "backward", gradients, *tensors, *settings, scale, *tiles, (1,) * rank, False
        )
    for mine, theirs in zip(given, gradients, strict=True):
        assert_close(mine, theirs, 1e-12)

    query, key, value = (t.detach().movedim(-2, 1).requires_grad_() for t in (query, key, value))
    logits = oracle_unfused.qk(problem, query, key)
    with torch.no_grad():
        (attn,) = written("qk_forward", [logits], query, key, None, *settings)
    assert_close(attn, logits, 1e-12)
    d_attn = torch.randn_like(attn)
    gradients = torch.autograd.grad(logits, (query, key), d_attn.masked_fill(attn.isinf(), 0))
    d_query, d_key = map(torch.empty_like, gradients)
    backward = getattr(libnatten, f"na{rank}d_qk_backward")
    with torch.no_grad():
        backward(d_query, d_key, None, d_attn, query, key, *settings)
    assert_close(d_query, gradients[0], 1e-12)
    assert_close(d_key, gradients[1], 1e-12)

    attn = attn.softmax(-1).requires_grad_()
    expected = oracle_unfused.av(problem, attn, value)
    with torch.no_grad():
        (output,) = written("av_forward", [expected], attn, value, *settings)
    assert_close(output, expected, 1e-12)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (attn, value), cotangent)
    with torch.no_grad():
        given = written("av_backward", gradients, cotangent, attn, value, *settings)
    for mine, theirs in zip(given, gradients, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_the_bias_gradient_of_the_extension_module():
    problem = plain((9, 8), 3, 2, has_rpb=True)
    query, key, *_, rpb = leaves(*oracle_unfused.heads_first(problem.operands(torch.float64)))
    logits = oracle_unfused.qk(problem, query, key, None, rpb)
    cotangent = torch.randn_like(logits)
    gradients = torch.autograd.grad(logits, (query, key, rpb), cotangent)
    given = [torch.empty_like(t) for t in gradients]
    with torch.no_grad():
        libnatten.na2d_qk_backward(*given, cotangent, query, key, 3, 2)
    for mine, theirs in zip(given, gradients, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_delta():
    out, d_out = torch.randn(2, 7, 3, 5), torch.randn(2, 7, 3, 5)
    delta = torch.empty(2, 7, 3)
    libnatten.compute_delta(out.bfloat16(), d_out.bfloat16(), delta)
    exact = (out.bfloat16().double() * d_out.bfloat16().double()).sum(-1)
    assert_close(delta, exact.float(), 1e-6)
    with pytest.raises(ValueError, match=r"delta\.shape"):
        libnatten.compute_delta(out, d_out, torch.empty(2, 7))
    with pytest.raises(ValueError, match=r"d_out\.shape"):
        libnatten.compute_delta(out, d_out[:1], delta)


# natten.utils -------------------------------------------------------------------------------------------------------


def test_arguments_one_per_axis():
    assert checks.check_all_args(2, 7, (1, 2), False) == ((7, 7), (1, 2), (False, False))
    assert checks.check_all_args(1, [3], 2, None, True) == ((3,), (2,), (1,), (True,))
    assert checks.check_all_args(3, 3, dilation=None, is_causal=(True, False, False))[1] == (
        1,
        1,
        1,
    )
    assert checks.check_input_size_arg(2, (5, 6)) == (5, 6)
    assert checks.get_num_na_weights((3, 5)) == 15
    for call in (
        lambda: checks.check_kernel_size_arg(2, 3.5),
        lambda: checks.check_kernel_size_arg(2, (3, 3, 3)),
        lambda: checks.check_dilation_arg(1, 0),
        lambda: checks.check_causal_arg(2, 1),
        lambda: checks.check_tiling_config(2, (8, 8, 8)),
        lambda: checks.check_backward_tiling_config(1, (8, 8, 1)),
    ):
        with pytest.raises(ValueError, match=r"kernel_size|dilation|is_causal|tiling_config"):
            call()
    assert checks.check_tiling_config(2, ((8, 8), (8, 16))) == ((8, 8), (8, 16))
    assert checks.check_backward_tiling_config(1, (8, 8, 1, False)) == ((8,), (8,), (1,), False)


def test_tensors_that_callers_make_and_check():
    query = torch.randn(2, 3, 7, 4)
    assert checks.make_attn_tensor_from_input(query, 9).shape == (2, 3, 7, 9)
    assert checks.check_additional_keys(query, None) == 0
    assert checks.check_additional_keys(query, torch.empty(2, 3, 5, 4)) == 5
    attn = torch.empty(2, 3, 7, 9)
    assert checks.check_additional_values(attn, torch.empty(2, 3, 4, 4), query, 5) == 4
    with pytest.raises(ValueError, match=r"additional_keys\.shape"):
        checks.check_additional_keys(query, torch.empty(2, 3, 5, 6))
    with pytest.raises(ValueError, match=r"attn\.shape"):
        checks.check_additional_values(attn, None, query, 5)


def test_tests_are_skipped_where_they_cannot_run():
    testing = importlib.import_module("natten.utils.testing")
    ran = []

    class Case(unittest.TestCase):
        @testing.skip_if_fna_is_not_supported()
        def test_fna(self):
            ran.append("fna")

        @testing.skip_if_cuda_is_not_supported()
        def test_cuda(self):
            ran.append("cuda")

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert not result.failures
    assert not result.errors
    expected = ["cuda", "fna"] if natten.has_cuda() else ["fna"]
    assert sorted(ran) == expected
    assert len(result.skipped) == 2 - len(expected)


def test_log_level(monkeypatch):
    monkeypatch.setenv("NATTEN_LOG_LEVEL", "debug")
    assert natten.utils.log.get_logger("natten.test.debug").level == 10
    monkeypatch.setenv("NATTEN_LOG_LEVEL", "no such level")
    assert natten.utils.log.get_logger("natten.test.none").level == 0
