# SPDX-License-Identifier: MIT
"""What only a GPU has: streams, graphs, several devices, asynchrony. Runs with ``--device cuda``."""

from __future__ import annotations

import pytest
import torch

import natten
from natten import _C, _dispatch, info
from tests import oracle
from tests.policies import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda", reason=f"needs --device cuda; tests run on {DEVICE.type}"
)
DTYPES = [torch.float16, torch.float32]
BUSY = 200_000_000  # cycles: some 100 ms


def tokens(dtype=torch.float16, grid=(24, 40), device=None):
    return torch.randn(3, 1, *grid, 2, 64, device=device).to(dtype)


def train(query, key, value):
    """Output and all gradients, for an output's gradient that is the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = natten.na2d(*leaves, kernel_size=(7, 9))
    return [output.detach(), *torch.autograd.grad(output, leaves, output.detach())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams(dtype):
    """What runs on a stream waits for that stream, and for no other."""
    qkv = tokens(dtype)
    expected = train(*qkv)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(qkv)
        torch.cuda._sleep(BUSY)
        late.copy_(qkv)  # only after the sleep
        results = train(*late)
        was_running = not stream.query()
    assert was_running, "the launch waited for the stream"
    assert torch.cuda.current_stream().query(), "work went to another stream"
    stream.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_two_streams_at_once():
    first, second = tokens(), tokens()
    expected = [train(*first), train(*second)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream, qkv in zip(streams, (first, second), strict=True):
            with torch.cuda.stream(stream):
                results.append(train(*qkv))
    torch.cuda.synchronize()
    for n, result in enumerate(results):
        for tensor, right in zip(result, expected[n % 2], strict=True):
            assert torch.equal(tensor, right)


def test_nothing_waits_for_the_gpu():
    qkv = tokens()
    train(*qkv)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graphs(dtype):
    """Captured with some numbers, replayed with others; forward and backward."""
    qkv = tokens(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for before a capture
        for _ in range(3):
            train(*qkv)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(*qkv)
    for _ in range(2):
        qkv.copy_(tokens(dtype))
        graph.replay()
        for result, right in zip(results, train(*qkv), strict=True):
            assert torch.equal(result, right)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
def test_compiled_into_graphs():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: natten.na2d(q * 1.0, k, v, (7, 9)) + 1, mode="reduce-overhead"
    )
    for _ in range(4):
        query, key, value = tokens()
        expected = natten.na2d(query, key, value, (7, 9)) + 1
        oracle.assert_close(compiled(query, key, value).clone(), expected, 4e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    with torch.cuda.device(0):
        there = tokens(device="cuda:1")
        here = there.to("cuda:0")
        results = train(*there)
        assert torch.cuda.current_device() == 0
    for result, right in zip(results, train(*here), strict=True):
        assert result.device.index == 1
        oracle.assert_close(result, right, 4e-3 * right.abs().max().item())


def test_memory_is_torchs():
    """What a call needs comes from torch's allocator, and goes back."""
    qkv = tokens(grid=(64, 64))
    train(*qkv)
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    outside = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    for _ in range(3):
        train(*qkv)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() == outside


def test_large_offsets():
    """Elements beyond 2^31 of a tensor are read and written where they are."""
    heads, dim, length = 3, 128, 6_000_000
    needed = 4 * length * heads * dim * 2
    if torch.cuda.mem_get_info()[0] < 1.5 * needed:
        pytest.skip(f"needs {1.5 * needed / 1e9:.0f} GB of free memory")
    x = torch.empty(1, length, heads, dim, dtype=torch.float16).normal_()
    output = natten.na1d(x, x, x, 33)
    tail = x[:, -200:]
    expected = natten.na1d(tail, tail, tail, 33, backend="reference")
    oracle.assert_close(output[:, -100:], expected[:, -100:], 4e-3)


def test_bitwise_repeatable_beside_other_work():
    """Whatever else the GPU does: no atomics, no order of blocks."""
    qkv = tokens(torch.float32, grid=(50, 60))
    expected = train(*qkv)
    other = torch.cuda.Stream()
    matrix = torch.randn(2048, 2048)
    for _ in range(5):
        with torch.cuda.stream(other):
            matrix @ matrix
        for result, right in zip(train(*qkv), expected, strict=True):
            assert torch.equal(result, right)
    torch.cuda.synchronize()


def test_info_names_the_gpu():
    report = info.report()
    arch = _dispatch.arch_of(torch.device("cuda"))
    assert f"SM{arch}" in report
    for kernel in _C.kernels("cuda"):
        assert (f"  {kernel.name} " in report) == bool(kernel.archs)
