# SPDX-License-Identifier: MIT
"""Dense attention, packed sequences, and merging."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import natten
from tests.oracle import assert_close

BACKENDS = ("reference", "naive", "fna")


def sdpa(query, key, value, is_causal=False, scale=None):
    """[batch, length, heads, head_dim], in float64, top-left causal, rows of GQA repeated."""
    group = query.shape[2] // key.shape[2]
    flat = [
        t.double().transpose(1, 2)
        for t in (query, *(t.repeat_interleave(group, 2) for t in (key, value)))
    ]
    mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    mask = mask.tril() if is_causal else mask
    logits = (flat[0] @ flat[1].mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ flat[2]).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(9, 9), (5, 17), (17, 5), (40, 3), (1, 8), (33, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(backend, lengths, is_causal):
    query = torch.randn(2, lengths[0], 4, 16, requires_grad=True)
    key = torch.randn(2, lengths[1], 2, 16, requires_grad=True)
    value = torch.randn(2, lengths[1], 2, 24, requires_grad=True)
    output, lse = natten.attention(
        query, key, value, is_causal=is_causal, backend=backend, return_lse=True
    )
    expected, expected_lse = sdpa(query, key, value, is_causal)
    assert_close(output, expected, 1e-5)
    assert_close(lse, expected_lse, 1e-5)
    cotangents = torch.randn_like(output), torch.randn_like(lse)
    gradients = torch.autograd.grad((output, lse), (query, key, value), cotangents)
    right = torch.autograd.grad(
        (expected, expected_lse), (query, key, value), [t.double() for t in cotangents]
    )
    for name, gradient, exact in zip(
        ("d_query", "d_key", "d_value"), gradients, right, strict=True
    ):
        assert_close(gradient, exact, 1e-4, name)


def test_causal_is_torchs():
    query, key, value = torch.randn(3, 2, 19, 4, 32).unbind()
    output = natten.attention(query, key, value, is_causal=True, scale=0.1)
    flat = [t.transpose(1, 2) for t in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*flat, is_causal=True, scale=0.1)
    assert_close(output, expected.transpose(1, 2), 1e-5)


@pytest.mark.parametrize("empty", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(empty, backend):
    query = torch.randn(2, empty[0], 2, 8, requires_grad=True)
    key, value = torch.randn(2, 2, empty[1], 2, 8, requires_grad=True).unbind()
    output, lse = natten.attention(query, key, value, backend=backend, return_lse=True)
    assert output.shape == query.shape
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(output.sum(), (query, key, value)):
        assert (gradient == 0).all()


LENGTHS = ([3, 0, 7, 1], [5, 4, 2, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(backend, cumulative, is_causal):
    query = torch.randn(1, sum(LENGTHS[0]), 4, 16, requires_grad=True)
    key, value = (torch.randn(1, sum(LENGTHS[1]), 2, 16, requires_grad=True) for _ in range(2))
    lengths = [torch.tensor(numbers, dtype=torch.int32) for numbers in LENGTHS]
    bounds = [functional.pad(numbers.cumsum(0), (1, 0)).to(torch.int32) for numbers in lengths]
    if cumulative:
        settings = {
            "cumulative_seqlen_Q": bounds[0],
            "cumulative_seqlen_KV": bounds[1],
            "max_seqlen_Q": 7,
            "max_seqlen_KV": 5,
        }
    else:
        settings = {"seqlens_Q": lengths[0], "seqlens_KV": lengths[1]}
    output, lse = natten.attention(
        query, key, value, is_causal=is_causal, backend=backend, return_lse=True, **settings
    )
    parts = []
    for i in range(4):
        q = query[:, bounds[0][i] : bounds[0][i + 1]]
        k, v = (t[:, bounds[1][i] : bounds[1][i + 1]] for t in (key, value))
        parts.append(
            sdpa(q, k, v, is_causal)[0].nan_to_num() if k.shape[1] else torch.zeros_like(q).double()
        )
    expected = torch.cat(parts, 1)
    assert_close(output, expected, 1e-5)
    assert lse.shape == query.shape[:-1]
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (query, key, value), cotangent)
    right = torch.autograd.grad(expected, (query, key, value), cotangent.double())
    for gradient, exact in zip(gradients, right, strict=True):
        assert_close(gradient, exact, 1e-4)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seqlens_Q": int32(4, 4)}, "seqlens"),
        ({"seqlens_Q": int32(4, 4), "seqlens_KV": int32(8)}, "sequences in KV"),
        ({"seqlens_Q": int32(4, 5), "seqlens_KV": int32(4, 4)}, "seqlens_Q"),
        ({"seqlens_Q": int32(9, -1), "seqlens_KV": int32(4, 4)}, "seqlens_Q"),
        ({"seqlens_Q": torch.tensor([8.0]), "seqlens_KV": int32(8)}, "seqlens_Q"),
        (
            {"cumulative_seqlen_Q": int32(0, 8), "cumulative_seqlen_KV": int32(1, 8)},
            "cumulative_seqlen_KV",
        ),
        (
            {"cumulative_seqlen_Q": int32(0), "cumulative_seqlen_KV": int32(0)},
            "cumulative_seqlen_Q",
        ),
        (
            {
                "cumulative_seqlen_Q": int32(0, 8),
                "cumulative_seqlen_KV": int32(0, 8),
                "seqlens_Q": int32(8),
                "seqlens_KV": int32(8),
            },
            "beside",
        ),
    ],
    ids=str,
)
def test_wrong_packing(settings, match):
    x = torch.randn(1, 8, 2, 8)
    with pytest.raises(ValueError, match=match):
        natten.attention(x, x, x, **settings)


def test_packing_wants_a_batch_of_one():
    x = torch.randn(2, 8, 2, 8)
    with pytest.raises(ValueError, match=r"query\.shape"):
        natten.attention(x, x, x, seqlens_Q=int32(8), seqlens_KV=int32(8))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge(parts, dtype):
    query = torch.randn(2, 6, 3, 8, dtype=dtype)
    key, value = torch.randn(2, 2, 20, 3, 8, dtype=dtype)
    cuts = [0, *sorted(torch.randperm(19)[: parts - 1].add(1).tolist()), 20]
    pieces = [
        natten.attention(query, key[:, a:b], value[:, a:b], return_lse=True)
        for a, b in pairwise(cuts)
    ]
    merged, lse = natten.merge_attentions(*zip(*pieces, strict=True))
    expected, expected_lse = sdpa(query, key, value)
    tolerance = 4 * torch.finfo(dtype).eps
    assert merged.dtype == dtype
    assert_close(merged, expected, tolerance * 4)
    assert_close(lse, expected_lse, max(tolerance, 1e-6) * 4)


def test_merge_has_exact_gradients():
    outputs = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def merge(*tensors):
        return natten.merge_attentions(tensors[:3], tensors[3:])

    assert torch.autograd.gradcheck(merge, (*outputs, *lses))
    assert torch.autograd.gradgradcheck(merge, (*outputs, *lses))


def test_merge_of_attentions_has_exact_gradients_and_changes_nothing():
    query, key, value = (
        t.requires_grad_() for t in torch.randn(3, 1, 8, 2, 8, dtype=torch.float64).unbind()
    )
    pieces = [
        natten.attention(query, key[:, part], value[:, part], return_lse=True)
        for part in (slice(0, 3), slice(3, 8))
    ]
    copies = [tensor.clone() for piece in pieces for tensor in piece]
    merged, lse = natten.merge_attentions(*zip(*pieces, strict=True))
    expected, expected_lse = sdpa(query, key, value)
    cotangents = torch.randn_like(merged), torch.randn_like(lse)
    gradients = torch.autograd.grad((merged, lse), (query, key, value), cotangents)
    right = torch.autograd.grad((expected, expected_lse), (query, key, value), cotangents)
    for gradient, exact in zip(gradients, right, strict=True):
        assert_close(gradient, exact, 1e-12)
    for tensor, copy in zip((tensor for piece in pieces for tensor in piece), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_merge_with_parts_without_keys():
    outputs = [torch.randn(4, 2, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor([0.5, -torch.inf, 1.0, -torch.inf]),
        torch.tensor([-torch.inf, 0.1, 2.0, -torch.inf]),
    ]
    lses = [lse.requires_grad_() for lse in lses]
    merged, lse = natten.merge_attentions(outputs, lses)
    assert torch.equal(merged[0], outputs[0][0])
    assert torch.equal(merged[1], outputs[1][1])
    assert (merged[3] == 0).all()
    assert lse[3] == -torch.inf
    gradients = torch.autograd.grad(merged.sum() + lse[:3].sum(), (*outputs, *lses))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("outputs", "lses", "match"),
    [
        ([], [], "outputs"),
        ([torch.zeros(2, 3)], [], "lse_tensors"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2)] * 2, r"outputs\[1\]"),
        ([torch.zeros(2, 3)] * 2, [torch.zeros(2), torch.zeros(3)], r"lse_tensors\[1\]"),
        ([torch.zeros(2, 3)], [torch.zeros(2, dtype=torch.int32)], r"lse_tensors\[0\]"),
    ],
    ids=str,
)
def test_wrong_parts(outputs, lses, match):
    with pytest.raises(ValueError, match=match):
        natten.merge_attentions(outputs, lses)
