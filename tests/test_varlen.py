# SPDX-License-Identifier: MIT
"""Attention of several grids in one packed sequence: as of each grid by itself."""

from __future__ import annotations

import math

import pytest
import torch

import natten
from natten.utils.varlen import generate_varlen_parameters
from natten.varlen import configure_varlen, neighborhood_attention_varlen
from tests import oracle
from tests.oracle import assert_close
from tests.test_compat import plain

GRIDS = [(6, 7), (9, 5), (6, 6)]
TOKENS = sum(map(math.prod, GRIDS))


def by_grid(tensors, kernel_sizes, dilations, is_causal):
    """Output and LSE by brute force, grid by grid."""
    outputs, lses, begin = [], [], 0
    for grid, kernel_size, dilation in zip(GRIDS, kernel_sizes, dilations, strict=True):
        end = begin + math.prod(grid)
        parts = [t[:, begin:end].unflatten(1, grid) for t in tensors]
        problem = plain(grid, kernel_size, dilation, is_causal)
        output, lse = oracle.dense(problem, (*parts, None, None, None))
        outputs.append(output.flatten(1, 2))
        lses.append(lse.flatten(1, 2))
        begin = end
    return torch.cat(outputs, 1), torch.cat(lses, 1)


@pytest.mark.parametrize("prepared", [False, True])
def test_grids_of_different_extents(prepared):
    tensors = [torch.randn(1, TOKENS, 2, 5, dtype=torch.float64) for _ in range(3)]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    windows = {"kernel_size_list": [3, (5, 3), 2], "dilation_list": [2, 1, (1, 3)]}
    windows["is_causal"] = (False, True)
    if prepared:
        metadata = configure_varlen(GRIDS, 5, "cpu", torch.float64, True, **windows)
        found = neighborhood_attention_varlen(*mine, metadata=metadata, return_lse=True)
    else:
        found = neighborhood_attention_varlen(
            *mine, token_layout_list=GRIDS, **windows, return_lse=True
        )
    expected = by_grid(
        theirs, windows["kernel_size_list"], windows["dilation_list"], windows["is_causal"]
    )
    cotangents = [torch.randn_like(t) for t in expected]
    for result, exact in zip(found, expected, strict=True):
        assert_close(result, exact, 1e-12)
    gradients = torch.autograd.grad(found, mine, cotangents)
    exact_gradients = torch.autograd.grad(expected, theirs, cotangents)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert_close(gradient, exact, 1e-12)


def test_one_window_for_all_grids():
    tensors = [torch.randn(1, TOKENS, 2, 5, dtype=torch.float64) for _ in range(3)]
    output = neighborhood_attention_varlen(
        *tensors, token_layout_list=GRIDS, kernel_size=3, dilation=1, backend="naive"
    )
    assert_close(output, by_grid(tensors, [3] * 3, [1] * 3, False)[0], 1e-12)


@pytest.mark.parametrize("boundary", ["mask", "zeros", "valid"])
def test_what_the_fused_functions_take(boundary):
    """Bias, additional keys, scale, boundary and offset: as of each grid by itself."""
    query, key, value = (torch.randn(1, TOKENS, 2, 5, dtype=torch.float64) for _ in range(3))
    more = [torch.randn(1, 3, 2, 5, dtype=torch.float64) for _ in range(2)]
    settings = {
        "rpb": torch.randn(2, 5, 7, dtype=torch.float64),
        "additional_keys": more[0],
        "additional_values": more[1],
        "scale": 0.7,
        "boundary": ("mask", boundary),
        "offset": (1, 0),
        "stride": (2, 1),
        "kernel_size": (3, 4),
    }
    found = neighborhood_attention_varlen(
        query, key, value, token_layout_list=GRIDS, **settings, return_lse=True
    )
    windows = {name: settings[name] for name in ("boundary", "offset", "stride", "kernel_size")}
    others = {name: value for name, value in settings.items() if name not in windows}
    metadata = configure_varlen(GRIDS, **windows)
    again = neighborhood_attention_varlen(query, key, value, metadata, **others, return_lse=True)
    parts, begin = [], 0
    for grid in GRIDS:
        end = begin + math.prod(grid)
        boxes = [tensor[:, begin:end].unflatten(1, grid) for tensor in (query, key, value)]
        output, lse = natten.na2d(*boxes, **settings, backend="reference", return_lse=True)
        parts.append((output.flatten(1, 2), lse.flatten(1, 2)))
        begin = end
    for expected, *results in zip(
        (torch.cat(part, 1) for part in zip(*parts, strict=True)), found, again, strict=True
    ):
        for result in results:
            assert_close(result, expected, 1e-12)


def test_metadata_may_be_repeated_but_not_contradicted():
    x = torch.randn(1, TOKENS, 2, 5)
    metadata = configure_varlen(GRIDS, kernel_size=3, dilation_list=[2, 1, 1], boundary="mask")
    expected = neighborhood_attention_varlen(x, x, x, metadata)
    for repeated in (
        {"token_layout_list": [list(grid) for grid in GRIDS]},
        {"kernel_size": [3, 3], "boundary": "mask", "is_causal": (False, False)},
        {"kernel_size_list": [3, (3, 3), torch.tensor([3, 3])], "dilation_list": [2, 1, 1]},
    ):
        assert torch.equal(neighborhood_attention_varlen(x, x, x, metadata, **repeated), expected)
    with pytest.raises(ValueError, match=r"dilation = 2; wanted \[\(2, 2\), \(1, 1\), \(1, 1\)\]"):
        neighborhood_attention_varlen(x, x, x, metadata, dilation=2)


def test_errors_say_which_grid():
    x = torch.randn(1, TOKENS, 2, 5)
    for arguments in ({"kernel_size": 6}, {"kernel_size_list": [3, 6, 3]}):
        with pytest.raises(
            ValueError, match=r"in grid 1 of token_layout_list, \(9, 5\): kernel_size\[1\]"
        ):
            neighborhood_attention_varlen(x, x, x, token_layout_list=GRIDS, **arguments)
    with pytest.raises(
        NotImplementedError, match=r"in grid 0 of token_layout_list, \(6, 7\): no kernel"
    ):
        neighborhood_attention_varlen(
            x.double(), x.double(), x.double(), token_layout_list=GRIDS, backend="fna"
        )


def test_bad_layouts():
    x = torch.randn(1, TOKENS, 2, 5)
    for arguments, said in (
        ({}, "at least one grid"),
        ({"token_layout_list": [(6, 7), (9,)]}, "same rank"),
        ({"token_layout_list": GRIDS[:2]}, "tokens of all grids"),
        (
            {"token_layout_list": GRIDS, "stride_list": [1]},
            r"stride_list = \[1\]; wanted a list of 3",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            neighborhood_attention_varlen(x, x, x, kernel_size=3, **arguments)
    with pytest.raises(ValueError, match=r"query\.shape"):
        neighborhood_attention_varlen(x[0], x, x, token_layout_list=GRIDS)


def test_bounds_of_packed_sequences():
    query, key = torch.randn(1, 9, 2, 4), torch.randn(1, 12, 2, 4)
    lengths = torch.tensor([4, 0, 5], dtype=torch.int32)
    lengths_kv = torch.tensor([3, 3, 6], dtype=torch.int32)
    starts, starts_kv, longest, longest_kv = generate_varlen_parameters(
        query, key, key, lengths, lengths_kv
    )
    assert starts.tolist() == [0, 4, 4, 9]
    assert starts_kv.tolist() == [0, 3, 6, 12]
    assert starts.dtype == starts_kv.dtype == torch.int32
    assert (longest, longest_kv) == (5, 6)
    assert generate_varlen_parameters(query, query, query, None, None) == (None, None, 0, 0)
    with pytest.raises(ValueError, match="KV"):
        generate_varlen_parameters(query, key, key, lengths, None)
