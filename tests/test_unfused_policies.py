# SPDX-License-Identifier: MIT
"""The unfused ops by every policy of a GPU: on one with ``--device cuda``, else by emulated kernels (`make emulation`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from natten.functional import na2d_av, na2d_qk
from tests import oracle
from tests.policies import DEVICE, EMULATION, emulated_policies, policies
from tests.test_unfused import FEATURES, check_av, check_qk, random

IS_ON_GPU = DEVICE.type == "cuda"
# Tensors are made on the CPU, and moved: brute force goes number by number.
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not (IS_ON_GPU or EMULATION.exists()), reason="needs a GPU, or `make emulation`"
    ),
]
POLICIES = policies(op="qk") if IS_ON_GPU else emulated_policies("qk")
WHERE = DEVICE if IS_ON_GPU else torch.device("cpu")


@pytest.fixture(params=POLICIES, ids=str)
def policy(request):
    if request.param.obstacle:
        pytest.skip(request.param.obstacle)
    return request.param


def fitting(features, policy):
    """A random problem, with head dims that the policy holds."""
    problem = random(features, 1)
    return replace(
        problem,
        head_dim=min(problem.head_dim, policy.max_head_dim),
        head_dim_value=min(problem.head_dim_value, policy.max_head_dim),
    )


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_qk(features, policy):
    check_qk(fitting(features, policy), policy.backend, policy.dtype, WHERE, policy.precision)


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_av(features, policy):
    check_av(fitting(features, policy), policy.backend, policy.dtype, WHERE, policy.precision)


def test_many_tiles(policy):
    """Both halves on a larger map, forward and backward, against the reference."""
    head_dim = min(32, policy.max_head_dim)
    grid = (33, 35) if policy.multiplies_tiles else (11, 12)
    query, key, value = torch.randn(3, 1, 2, *grid, head_dim).to(policy.dtype).unbind()

    def run(backend, dtype, device):
        leaves = [t.to(device, dtype).requires_grad_() for t in (query, key, value)]
        weights = na2d_qk(leaves[0] * 0.2, leaves[1], (7, 9), backend=backend).softmax(-1)
        output = na2d_av(weights, leaves[2], (7, 9), backend=backend)
        return [output.detach(), *torch.autograd.grad(output.double().square().sum(), leaves)]

    rounding = 16 * torch.finfo(policy.precision).eps
    for result, right in zip(
        run(policy.backend, policy.dtype, WHERE),
        run("reference", torch.float64, "cpu"),
        strict=True,
    ):
        oracle.assert_close(result, right, rounding * right.abs().max().item())
