# SPDX-License-Identifier: MIT
"""What neighborhood attention becomes for particular arguments: dense, causal, blocked, haloed, shifted, ..."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import natten
from tests.oracle import assert_close

BACKENDS = ("reference", "naive", "fna")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with natten.use_backend(request.param):
        yield request.param


@pytest.fixture
def tensors():
    def make(*grid, heads=2, dim=16, batch=2):
        return torch.randn(3, batch, *grid, heads, dim).unbind()

    return make


def sdpa(query, key, value, **settings):
    """Dense attention, heads-last, over the flattened grid."""
    rank = query.dim() - 3
    flat = [t.flatten(1, rank).transpose(1, 2).double() for t in (query, key, value)]
    output = functional.scaled_dot_product_attention(*flat, **settings)
    return output.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


@pytest.mark.parametrize("grid", [(13,), (5, 6), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("boundary", ["shift", "mask"])
def test_whole_window_is_self_attention(grid, boundary, tensors):
    query, key, value = tensors(*grid)
    if boundary == "shift":
        output = natten.neighborhood_attention_generic(query, key, value, grid)
        whole = natten.neighborhood_attention_generic(query, key, value, -1)
        assert torch.equal(output, whole)
    else:
        wide = tuple(2 * extent + 1 for extent in grid)
        output = natten.neighborhood_attention_generic(query, key, value, wide, boundary=boundary)
    assert_close(output, sdpa(query, key, value), 1e-5)


def test_whole_window_whatever_the_stride(tensors):
    query, key, value = tensors(5, 6)
    assert_close(
        natten.na2d(query, key, value, (5, 6), stride=(2, 6)), sdpa(query, key, value), 1e-5
    )


@pytest.mark.parametrize("boundary", ["shift", "mask"])
def test_whole_causal_window_is_causal_attention(boundary, tensors):
    query, key, value = tensors(21)
    output = natten.na1d(query, key, value, 21, is_causal=True, boundary=boundary)
    assert_close(output, sdpa(query, key, value, is_causal=True), 1e-5)


def test_window_of_one_is_the_value(tensors):
    query, key, value = tensors(5, 6)
    assert_close(natten.na2d(query, key, value, 1), value, 1e-6)


@pytest.mark.parametrize("boundary", ["shift", "mask"])
def test_stride_of_the_window_is_blocked_attention(boundary, tensors):
    query, key, value = tensors(8, 12)
    output = natten.na2d(query, key, value, (4, 6), stride=(4, 6), boundary=boundary)

    rows = []
    for y in range(0, 8, 4):
        columns = [
            sdpa(*(t[:, y : y + 4, x : x + 6] for t in (query, key, value)))
            for x in range(0, 12, 6)
        ]
        rows.append(torch.cat(columns, 2))
    assert_close(output, torch.cat(rows, 1), 1e-5)


def test_offset_is_shifted_windows(tensors):
    """Swin's shifted windows: roll, attend within blocks and within what was together before, roll back."""
    query, key, value = tensors(8, 8)
    size, shift = 4, 2
    output = natten.na2d(query, key, value, size, stride=size, offset=shift, boundary="mask")
    edges = [0, shift, shift + size, 8]
    expected = torch.empty_like(output, dtype=torch.float64)
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            box = (slice(None), slice(top, bottom), slice(left, right))
            expected[box] = sdpa(query[box], key[box], value[box])
    assert_close(output, expected, 1e-5)


def test_blocks_with_a_halo(tensors):
    """HaloNet: queries in blocks, keys in the block and around it, nothing outside the map."""
    query, key, value = tensors(8, 12)
    block, halo = 4, 1
    output = natten.na2d(query, key, value, block + 2 * halo, stride=block, boundary="mask")
    expected = torch.empty_like(output, dtype=torch.float64)
    for y in range(0, 8, block):
        for x in range(0, 12, block):
            inner = (slice(None), slice(y, y + block), slice(x, x + block))
            outer = (
                slice(None),
                slice(max(0, y - halo), y + block + halo),
                slice(max(0, x - halo), x + block + halo),
            )
            q, k, v = query[inner], key[outer], value[outer]
            flat = [t.flatten(1, 2).transpose(1, 2).double() for t in (q, k, v)]
            attended = functional.scaled_dot_product_attention(*flat).transpose(1, 2)
            expected[inner] = attended.reshape(q.shape)
    assert_close(output, expected, 1e-5)


@pytest.mark.parametrize("kernel_size", [(3, 5), (4, 2)], ids=str)
def test_zeros_is_zero_padding(kernel_size, tensors):
    """SASA: keys and values padded with zeros after the projection, and nothing masked."""
    query, key, value = tensors(6, 7)
    output, lse = natten.na2d(query, key, value, kernel_size, boundary="zeros", return_lse=True)
    (top, left), (height, width) = (size // 2 for size in kernel_size), (6, 7)
    bottom, right = kernel_size[0] - 1 - top, kernel_size[1] - 1 - left
    padding = (0, 0, 0, 0, left, right, top, bottom)
    padded = [
        functional.pad(t, padding).unfold(1, kernel_size[0], 1).unfold(2, kernel_size[1], 1)
        for t in (key, value)
    ]
    keys, values = (
        t.flatten(-2).double() for t in padded
    )  # [batch, height, width, heads, dim, window]
    logits = torch.einsum("bxyhd,bxyhdw->bxyhw", query.double(), keys) * 0.25
    assert keys.shape[1:3] == (height, width)
    assert_close(output, torch.einsum("bxyhw,bxyhdw->bxyhd", logits.softmax(-1), values), 1e-5)
    assert_close(lse, logits.logsumexp(-1), 1e-5)


def test_valid_is_the_middle(tensors):
    query, key, value = tensors(11, 12)
    output, lse = natten.na2d(
        query, key, value, (3, 4), dilation=(2, 1), boundary="valid", return_lse=True
    )
    everything, all_lse = natten.na2d(query, key, value, (3, 4), dilation=(2, 1), return_lse=True)
    assert output.shape == (2, 11 - 2 * 2, 12 - 3, 2, 16)
    # Where windows are whole, no boundary says anything.
    assert_close(output, everything[:, 2:-2, 2:-1], 1e-6)
    assert_close(lse, all_lse[:, 2:-2, 2:-1], 1e-6)


@pytest.mark.parametrize("boundary", ["shift", "mask", "zeros"])
def test_box_is_a_slice_of_the_whole(boundary, tensors):
    """A rank's tokens against those and their halo."""
    query, key, value = tensors(14, 9)
    settings = {"kernel_size": (5, 3), "stride": (2, 1), "boundary": boundary, "return_lse": True}
    whole, whole_lse = natten.na2d(query, key, value, **settings)
    pieces, lses = [], []
    for begin, end, low, high in ((0, 5, 0, 8), (5, 9, 2, 12), (9, 14, 6, 14)):
        output, lse = natten.na2d(
            query[:, begin:end],
            key[:, low:high],
            value[:, low:high],
            grid=(14, 9),
            query_origin=(begin, 0),
            key_origin=(low, 0),
            **settings,
        )
        pieces.append(output)
        lses.append(lse)
    assert_close(torch.cat(pieces, 1), whole, 1e-6)
    assert_close(torch.cat(lses, 1), whole_lse, 1e-6)


def test_circular_axis(tensors):
    """A larger grid whose keys are wrapped round: every window is a neighborhood on the circle."""
    query, key, value = tensors(10)
    left, right = 2, 2
    wrapped = [torch.cat([t[:, -left:], t, t[:, :right]], 1) for t in (key, value)]
    output = natten.na1d(query, *wrapped, kernel_size=5, grid=14, query_origin=left, key_origin=0)
    for turn in (1, 4, 9):
        turned = [torch.roll(t, turn, 1) for t in (query, key, value)]
        again = [torch.cat([t[:, -left:], t, t[:, :right]], 1) for t in turned[1:]]
        rolled = natten.na1d(
            turned[0], *again, kernel_size=5, grid=14, query_origin=left, key_origin=0
        )
        assert_close(rolled, torch.roll(output, turn, 1), 1e-6)


def test_streaming_against_a_cache(tensors):
    """Frame by frame on a causal axis, with no more than the window's frames in memory."""
    query, key, value = tensors(9, 4, 5)
    settings = {"kernel_size": (4, 3, 3), "is_causal": (True, False, False)}
    whole = natten.na3d(query, key, value, **settings)
    for frame in range(9):
        first = max(0, frame - 3)
        output = natten.na3d(
            query[:, frame : frame + 1],
            key[:, first : frame + 1],
            value[:, first : frame + 1],
            grid=(9, 4, 5),
            query_origin=(frame, 0, 0),
            key_origin=(first, 0, 0),
            **settings,
        )
        assert_close(output, whole[:, frame : frame + 1], 1e-6)


def test_dilation_is_attention_within_groups(tensors):
    query, key, value = tensors(13)
    output = natten.na1d(query, key, value, 4, dilation=3)
    for group in range(3):
        q, k, v = (t[:, group::3] for t in (query, key, value))
        assert_close(output[:, group::3], natten.na1d(q, k, v, 4), 1e-6)


def test_additional_keys_are_merged_attention(tensors):
    query, key, value = tensors(6, 7)
    more_keys, more_values, _ = tensors(5)
    output, lse = natten.na2d(
        query,
        key,
        value,
        3,
        additional_keys=more_keys,
        additional_values=more_values,
        return_lse=True,
    )
    window = natten.na2d(query, key, value, 3, return_lse=True)
    dense, dense_lse = natten.attention(
        query.flatten(1, 2), more_keys, more_values, return_lse=True
    )
    dense = dense.reshape(query.shape), dense_lse.reshape(query.shape[:-1])
    merged, merged_lse = natten.merge_attentions(*zip(window, dense, strict=True))
    assert_close(output, merged, 1e-5)
    assert_close(lse, merged_lse, 1e-5)
