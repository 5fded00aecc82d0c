# SPDX-License-Identifier: MIT
"""Problems too large for one packed stream: what is cut into pieces, blocks and threads fits together again.

Head dim 512 makes a token so large that this happens with few of them. Oracle: the naive kernels.
"""

from __future__ import annotations

import pytest
import torch

import natten
from natten import _C
from natten.functional import na2d_av

pytestmark = pytest.mark.cpu  # of the streams of the CPU's kernels

CASES = {
    # The window alone is larger than what is packed at a time: pieces, with a state per tile.
    "pieces-1d": {"grid": (1500,), "kernel_size": 1200},
    "pieces-1d-causal": {"grid": (1500,), "kernel_size": 1300, "is_causal": True},
    "pieces-2d": {"grid": (36, 37), "kernel_size": 33},
    # One slice of tiles needs a stream that is too wide: cut across the walk.
    "blocks-3d": {"grid": (4, 20, 21), "kernel_size": (3, 9, 8)},
    "blocks-2d": {"grid": (9, 300), "kernel_size": (7, 9), "dilation": (1, 2)},
    # A ring that turns round many times.
    "ring-2d": {"grid": (90, 12), "kernel_size": (9, 5), "stride": (2, 1)},
    "ring-2d-mask": {"grid": (90, 12), "kernel_size": (9, 5), "boundary": "mask"},
    # Additional tokens that stay packed, and so many that they come in pieces.
    "additional": {"grid": (20, 20), "kernel_size": 7, "additional": 40},
    "additional-pieces": {"grid": (12, 13), "kernel_size": 5, "additional": 900},
    "gqa": {"grid": (24, 24), "kernel_size": 7, "heads": 4, "heads_kv": 1},
    # Queries in lines: of several panels, rows longer than a block of packed words, and windows longer than a chunk.
    "lines-2d": {"grid": (13, 90), "kernel_size": (5, 31), "stride": (1, 3), "heads": 2},
    "lines-long": {"grid": (2, 390), "kernel_size": (2, 17), "is_causal": (False, True)},
    "lines-1d": {"grid": (700,), "kernel_size": 301, "additional": 3},
    "lines-1d-dilated": {"grid": (1300,), "kernel_size": 155, "dilation": 3, "boundary": "mask"},
}


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_naive(name, dtype, threads):
    case = dict(CASES[name])
    grid = case.pop("grid")
    heads, heads_kv = case.pop("heads", 1), case.pop("heads_kv", 1)
    additional = case.pop("additional", 0)
    head_dim = 512
    torch.manual_seed(sum(grid))

    def normal(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    query, key, value = (normal(1, *grid, h, head_dim) for h in (heads, heads_kv, heads_kv))
    more = [normal(1, additional, heads_kv, head_dim) for _ in range(2 if additional else 0)]
    names = ["query", "key", "value", "additional_keys", "additional_values"]
    inputs = dict(zip(names, [query, key, value, *more], strict=False))
    cotangents = torch.randn(1, *grid, heads, head_dim).to(dtype), torch.randn(1, *grid, heads)

    def run(backend):
        output, lse = natten.neighborhood_attention_generic(
            **inputs, **case, backend=backend, return_lse=True
        )
        gradients = torch.autograd.grad((output, lse), list(inputs.values()), cotangents)
        return dict(zip(["output", "lse", *inputs], [output, lse, *gradients], strict=True))

    torch.set_num_threads(2)
    expected = run("naive")
    torch.set_num_threads(threads)
    actual = run("fna")
    _assert_close(actual, expected, dtype)


def _assert_close(actual, expected, dtype):
    # Weights and their gradients are rounded to bfloat16 where the kernel multiplies in it.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for what, value in expected.items():
        scale = value.detach().abs().max().item()
        error = (actual[what].float() - value.float()).abs().max().item()
        assert error <= tolerance * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


# Of results that bypass the caches: more than a megabyte a thread. Two threads with one head take the backward in two passes.
ALL_ISAS = pytest.mark.parametrize("isa", _C.cpu_isas())
DTYPES_AND_THREADS = pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 1)],
    ids=str,
)
GRID = (54, 50)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_value"),
    [(256, 288), pytest.param(264, 256, id="264-256: rows of keys that are not whole lines")],
)
@DTYPES_AND_THREADS
@ALL_ISAS
def test_results_that_bypass_the_caches(isa, dtype, head_dim, head_dim_value, threads):
    torch.set_num_threads(threads)
    dims = (head_dim, head_dim, head_dim_value)
    inputs = [torch.randn(1, *GRID, 1, dim).to(dtype).requires_grad_() for dim in dims]
    cotangent = torch.randn(1, *GRID, 1, head_dim_value).to(dtype)

    def run(backend):
        output = natten.na2d(*inputs, kernel_size=3, dilation=(1, 2), backend=backend)
        gradients = torch.autograd.grad(output, inputs, cotangent)
        return dict(zip(["output", "query", "key", "value"], [output, *gradients], strict=True))

    _assert_close(run(f"fna:{isa}"), run("naive"), dtype)


@pytest.mark.parametrize("head_dim", [256, 264])
@DTYPES_AND_THREADS
@ALL_ISAS
def test_unfused_results_that_bypass_the_caches(isa, dtype, head_dim, threads):
    torch.set_num_threads(threads)
    weights = torch.rand(1, 1, *GRID, 9).to(dtype)
    value, cotangent = (torch.randn(1, 1, *GRID, head_dim).to(dtype) for _ in range(2))
    value.requires_grad_()

    def run(backend):
        output = na2d_av(weights, value, kernel_size=3, backend=backend)
        return {"output": output, "value": torch.autograd.grad(output, value, cotangent)[0]}

    _assert_close(run(f"gemm:{isa}"), run("naive"), dtype)
