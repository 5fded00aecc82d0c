# SPDX-License-Identifier: MIT
"""Backend flex gives what the reference gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import natten
from tests.cases import random_problem
from tests.oracle import assert_close
from tests.test_kernels import call

FEATURES = [
    ("rank1", "causal"),
    ("rank2", "stride", "even"),
    ("rank3", "dilation"),
    ("rank2", "zeros", "additional"),
    ("rank2", "boxes", "gqa"),
    ("rank1", "valid"),
    ("rank2", "offset", "value_dim"),
    ("rank2", "mask", "additional", "batch"),
]


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex(features, dtype):
    problem = replace(random_problem(features, 0), has_rpb=False, magnitude=1.0)
    if torch.get_default_device().type != "cpu":  # FlexAttention compiles head dims of 16 and more
        wide = max(16, problem.head_dim), max(16, problem.head_dim_value)
        problem = replace(problem, head_dim=wide[0], head_dim_value=wide[1])
    operands = problem.operands(dtype)
    output, lse = call(problem, operands, "flex")
    expected, expected_lse = call(problem, operands, "reference")
    tolerance = 8 * torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert_close(output, expected, tolerance * max(1.0, expected.abs().max().item()))
    assert_close(lse, expected_lse, 2e-5 * max(1.0, expected_lse.abs().max().item()))


def test_flex_attention():
    query, key = torch.randn(1, 9, 4, 16), torch.randn(1, 20, 2, 16)
    for is_causal in (False, True):
        output = natten.attention(query, key, key, is_causal=is_causal, backend="flex")
        expected = natten.attention(query, key, key, is_causal=is_causal, backend="reference")
        assert_close(output, expected, 1e-5)


def test_reasons_on_this_device():
    x = torch.randn(1, 8, 1, 16)
    rpb = torch.zeros(1, 5)
    with pytest.raises(NotImplementedError, match="bias table"):
        natten.na1d(x, x, x, 3, rpb=rpb, backend="flex")
