# SPDX-License-Identifier: MIT
"""Every op looks at every tensor that it is given before it reads one: eager and traced, whatever computes it."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from natten import libnatten

pytestmark = pytest.mark.cpu

OPS = torch.ops.natten
AXES = [6, 3, 1, 1, 0, 0, 0, 0, 6, 0, 6, 5, 3, 1, 1, 1, 0, 0, 0, 5, 0, 5]  # causal on the second
BATCH, GRID, HEADS, HEADS_KV, HEAD_DIM, VALUE_DIM = 2, (6, 5), 4, 2, 8, 7


def _fused(dtype):
    return {
        "query": torch.randn(BATCH, *GRID, HEADS, HEAD_DIM, dtype=dtype),
        "key": torch.randn(BATCH, *GRID, HEADS_KV, HEAD_DIM, dtype=dtype),
        "value": torch.randn(BATCH, *GRID, HEADS_KV, VALUE_DIM, dtype=dtype),
        "additional_keys": torch.randn(BATCH, 3, HEADS_KV, HEAD_DIM, dtype=dtype),
        "additional_values": torch.randn(BATCH, 3, HEADS_KV, VALUE_DIM, dtype=dtype),
        "rpb": torch.randn(HEADS, 5, 5),
    }


def arguments_of(op, dtype=torch.float32):
    """The tensors of a right call by name, and what follows them."""
    settings = (AXES, 0.3)
    weights = torch.randn(BATCH, HEADS, *GRID, 9, dtype=dtype)
    query = torch.randn(BATCH, HEADS, *GRID, HEAD_DIM, dtype=dtype)
    key = torch.randn(BATCH, HEADS_KV, *GRID, HEAD_DIM, dtype=dtype)
    if op == "backward":
        output = torch.randn(BATCH, *GRID, HEADS, VALUE_DIM, dtype=dtype)
        lse = torch.randn(BATCH, *GRID, HEADS)
        gradients = {"output": output, "lse": lse, "d_output": output.clone(), "d_lse": lse.clone()}
        return {**_fused(dtype), **gradients}, settings
    return {
        "forward": (_fused(dtype), settings),
        "qk": ({"query": query, "key": key, "rpb": torch.randn(HEADS, 5, 5)}, (AXES, False)),
        "av": ({"weights": weights, "value": key}, (AXES,)),
        "av_transposed": ({"weights": weights, "x": query}, (AXES, HEADS_KV)),
        "rpb_gradient": ({"weights": weights}, (AXES,)),
    }[op]


# Dims of which another number is another problem, and none that is wrong.
FREE = {
    ("qk", "key"): (1,),  # of 4 heads, 1 shares keys as well as 2
    ("av", "value"): (1, 4),
    ("av_transposed", "x"): (4,),
    ("rpb_gradient", "weights"): (0, 1),
}


def wrong_ones(op, name, tensor):
    """What a tensor may be instead, with a word for it."""
    floats = (torch.float64, torch.float16)
    for dtype in (*floats, torch.int32, torch.complex64, torch.bool):
        if dtype not in floats or (name != "rpb" and op != "rpb_gradient"):
            yield str(dtype), tensor.to(dtype)
    for dim in range(tensor.dim()):
        if dim not in FREE.get((op, name), ()):
            yield f"one less in dim {dim}", tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        if (op, dim) != ("rpb_gradient", 0):
            yield f"nothing in dim {dim}", tensor.narrow(dim, 0, 0)
    yield "one number in each dim", tensor[(slice(1),) * tensor.dim()]
    yield "0-d", tensor.flatten()[0]
    yield "a dim less", tensor[0]
    yield "a dim more", tensor[None]
    yield "flat", tensor.flatten()
    yield "sparse", tensor.to_sparse()
    if name not in ("rpb", "d_lse"):
        yield "nothing", None
    if op != "rpb_gradient":  # that has no other tensor to differ from
        yield "meta", tensor.to("meta")


@pytest.mark.parametrize("how", ["auto", "naive", "reference", "meta", "fake"])
@pytest.mark.parametrize("op", ["forward", "backward", "qk", "av", "av_transposed", "rpb_gradient"])
def test_each_tensor_is_checked(op, how):
    tensors, settings = arguments_of(op)

    def run(given):
        given = given.values()
        if how == "meta":
            given = [None if tensor is None else tensor.to("meta") for tensor in given]
        if how != "fake":
            return getattr(OPS, op)(*given, *settings, "auto" if how == "meta" else how)
        with FakeTensorMode() as mode:
            given = [None if tensor is None else mode.from_tensor(tensor) for tensor in given]
            return getattr(OPS, op)(*given, *settings, "auto")

    run(tensors)
    for name, tensor in tensors.items():
        for what, wrong in wrong_ones(op, name, tensor):
            if (what, how) in (("meta", "meta"), ("sparse", "meta")):
                continue
            print(name, what)  # noqa: T201  # shown if the test fails
            with pytest.raises(ValueError, match=r"wanted"):
                run({**tensors, name: wrong})
    run(tensors)


CONVERTED = ("torch.float64", "torch.float16", "torch.int32", "torch.complex64", "torch.bool")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_old_backward_checks_what_it_reads_and_writes(rank):
    x = torch.randn(1, *(5, 4, 3)[:rank], 2, 8)
    tensors = {name: torch.empty_like(x) for name in ("d_query", "d_key", "d_value")}
    tensors |= {name: torch.randn_like(x) for name in ("query", "key", "value", "out", "d_out")}
    tensors["lse"] = torch.randn(x.shape[:-1])

    def run(given):
        return getattr(libnatten, f"na{rank}d_backward")(*given.values(), 3, 1, False, 0.5)

    run(tensors)
    for name, tensor in tensors.items():
        ones = dict(wrong_ones("backward", name, tensor))
        ones["larger"] = tensor.new_empty(2, *tensor.shape)
        for what, wrong in ones.items():
            # Results are converted to the type they are wanted in, as ever.
            if what == "nothing" or (name in ("d_query", "d_key", "d_value") and what in CONVERTED):
                continue
            print(name, what)  # noqa: T201  # shown if the test fails
            with pytest.raises((ValueError, NotImplementedError), match=name):
                run({**tensors, name: wrong})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", ["forward", "backward", "qk", "av", "av_transposed", "rpb_gradient"])
def test_any_integers_as_axes(op, backend, seed):
    numbers = [-1, 0, 1, 2, 3, 5, 6, 7, 100, 2**29, 2**31 - 1, -(2**31), 2**31, 2**40, -(2**62)]
    choice = random.Random(seed)
    tensors, (_, *settings) = arguments_of(op)
    told = 0
    for _ in range(100):
        axes = AXES[: choice.choice([len(AXES)] * 9 + [choice.randrange(len(AXES))])]
        if axes:
            axes[choice.randrange(len(axes))] = choice.choice(numbers)
        try:
            getattr(OPS, op)(*tensors.values(), axes, *settings, backend)
        except ValueError:
            told += 1
    assert 50 < told < 100  # some are other problems of the same sizes
