# SPDX-License-Identifier: MIT
"""Graphs whose sizes, places and batch differ from call to call: made once, and checked when they run."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export

import natten

pytestmark = pytest.mark.cpu


def streaming(query, cache, first):
    """One query against the last 200 tokens; the grid goes on."""
    return natten.na1d(
        *(query, cache, cache),
        kernel_size=16,
        is_causal=True,
        boundary="mask",
        grid=2**20,
        query_origin=first + 100,
        key_origin=first,
    )


def growing(query, cache, length):
    """One query against all tokens that there are."""
    return natten.na1d(
        *(query, cache, cache),
        kernel_size=16,
        is_causal=True,
        boundary="mask",
        grid=length,
        query_origin=length - 1,
        key_origin=0,
    )


def itself(x):
    return natten.neighborhood_attention_generic(x, x, x, kernel_size=3)


def tokens(*shape):
    return torch.randn(*shape, 2, 8)


CASES = {
    "places": (
        streaming,
        lambda: [(tokens(1, 1), tokens(1, 200), first) for first in range(5, 17)],
    ),
    "extents and places": (
        growing,
        lambda: [(tokens(1, 1), tokens(1, length), length) for length in range(30, 42)],
    ),
    "extents": (itself, lambda: [(tokens(2, n, n + 1),) for n in range(8, 20)]),
    "batch": (itself, lambda: [(tokens(n, 6, 7),) for n in range(2, 14)]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_graph_serves_all_sizes(case):
    """A second one at most, where torch takes the first sizes for constants."""
    function, calls = CASES[case]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for arguments in calls():
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert counter.frame_count <= 2


def test_what_a_graph_cannot_know_is_checked_when_it_runs():
    torch._dynamo.reset()
    compiled = torch.compile(itself, backend="eager", dynamic=True)
    compiled(tokens(1, 5, 6))
    with pytest.raises(ValueError, match=r"kernel_size.*exceeds.*extent"):
        compiled(tokens(1, 2, 6))
    compiled = torch.compile(streaming, backend="eager", dynamic=True)
    compiled(tokens(1, 1), tokens(1, 200), 7)
    with pytest.raises(ValueError, match="the keys hold only tokens 7 to 56"):
        compiled(tokens(1, 1), tokens(1, 50), 7)
    with pytest.raises(ValueError, match="grid"):
        compiled(tokens(1, 1), tokens(1, 200), -3)


class Attention(torch.nn.Module):
    def forward(self, x):
        return itself(x)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dims_of_any_size(strict):
    dims = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    program = export(Attention(), (tokens(2, 8, 9),), dynamic_shapes=(dims,), strict=strict)
    for shape in ((2, 8, 9), (3, 11, 4), (1, 3, 40)):
        x = tokens(*shape)
        torch.testing.assert_close(program.module()(x), itself(x))
