# SPDX-License-Identifier: MIT
"""Backend flex gives what the reference gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

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


def test_empty():
    """No batch, no queries, no keys: what the reference says of them, and not an error."""
    x = torch.randn(2, 6, 2, 16)
    none = x[:, :0]
    box = {"grid": 6, "query_origin": 2, "key_origin": 0}
    calls = {
        "batch": lambda backend: natten.na1d(x[:0], x[:0], x[:0], 3, backend=backend),
        "box": lambda backend: natten.na1d(none, x, x, 3, **box, backend=backend),
        "grid": lambda b: natten.na1d(none, none, none, 3, boundary="mask", backend=b),
        "queries": lambda backend: natten.attention(none, x, x, backend=backend),
        "keys": lambda b: natten.attention(x, none, none, backend=b, return_lse=True)[1],
    }
    for what, run in calls.items():
        assert torch.equal(run("flex"), run("reference")), what


@pytest.mark.parametrize("boundary", ["shift", "zeros"])
def test_nothing_of_a_mode_outlives_it(boundary):
    """The first call of a size, where tensors have no numbers, and the next ones, where they have."""
    x = torch.randn(1, 9, 2, 16)

    def run(tensor, backend="flex"):
        return natten.na1d(tensor, tensor, tensor, 5, boundary=boundary, backend=backend)

    with FakeTensorMode() as mode:
        assert run(mode.from_tensor(x)).shape == x.shape
    with torch.inference_mode():
        run(torch.ones_like(x))
    vmap(run)(x[None])
    assert_close(run(x), run(x, "reference"), 1e-5)


@pytest.mark.parametrize("in_dims", [0, 2, (1, None, 3)], ids=str)
def test_vmap(in_dims):
    problem = random_problem(("rank2", "zeros", "additional", "gqa", "value_dim"), 0)
    problem = replace(
        problem, has_rpb=False, magnitude=1.0, head_dim=16, head_dim_value=16, batch=2
    )
    query, key, value, *more, _ = problem.operands(torch.float32)
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * 3

    def run(backend):
        def function(query, key, value):
            return torch.stack(call(problem, (query, key, value, *more, None), backend)[:1])

        return function

    samples = [
        t if dim is None else torch.stack([t, t.flip(0), 0.5 * t], dim)
        for t, dim in zip((query, key, value), dims, strict=True)
    ]
    found = vmap(run("flex"), dims)(*samples)
    each = [
        t.expand(3, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(samples, dims, strict=True)
    ]
    expected = torch.stack([run("reference")(*sample) for sample in zip(*each, strict=True)])
    assert_close(found, expected, 1e-5)
    nothing = [t if d is None else t.narrow(d, 0, 0) for t, d in zip(samples, dims, strict=True)]
    assert vmap(run("flex"), dims)(*nothing).shape == (0, *expected.shape[1:])


def test_reasons_on_this_device():
    x = torch.randn(1, 8, 1, 16)
    rpb = torch.zeros(1, 5)
    with pytest.raises(NotImplementedError, match="bias table"):
        natten.na1d(x, x, x, 3, rpb=rpb, backend="flex")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_are_refused_by_name():
    """And never zeros in silence."""
    x = torch.randn(1, 5, 1, 4)

    def run(x):
        return natten.na1d(x, x, x, 3, backend="flex").sum()

    with pytest.raises(NotImplementedError, match="'flex' has no forward mode"):
        jvp(run, (x,), (x,))
    with pytest.raises(NotImplementedError, match="'flex' has no forward mode"):
        vmap(lambda x: jvp(run, (x,), (x,)))(x[None])
    with forward_ad.dual_level():
        run(x)
        with pytest.raises(NotImplementedError, match="'flex' has no forward mode"):
            run(forward_ad.make_dual(x, x))
    for derivative in (grad(run), lambda x: vmap(grad(run))(x[None])):
        with pytest.raises(NotImplementedError, match=r"'flex'"):
            derivative(x)
