# SPDX-License-Identifier: MIT
"""The modules: constructors of both generations, checkpoints, and what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import natten
from tests.oracle import assert_close

CLASSES = (
    natten.NeighborhoodAttention1D,
    natten.NeighborhoodAttention2D,
    natten.NeighborhoodAttention3D,
)
GRIDS = ((9,), (7, 8), (4, 5, 6))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_forward(rank, rel_pos_bias):
    module = CLASSES[rank - 1](dim=24, num_heads=3, kernel_size=3, rel_pos_bias=rel_pos_bias)
    x = torch.randn(2, *GRIDS[rank - 1], 24)
    qkv = torch.nn.functional.linear(x, module.qkv.weight, module.qkv.bias)
    query, key, value = qkv.unflatten(-1, (3, 3, 8)).unbind(-3)
    attended = natten.neighborhood_attention_generic(
        query, key, value, 3, rpb=module.rpb, backend="reference"
    )
    expected = torch.nn.functional.linear(
        attended.flatten(-2), module.proj.weight, module.proj.bias
    )
    assert_close(module(x), expected, 1e-5)
    module(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_parameters(rank):
    module = CLASSES[rank - 1](dim=24, num_heads=3, kernel_size=5, bias=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "qkv.weight": (72, 24),
        "qkv.bias": (72,),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
        "rpb": (3, *(9,) * rank),
    }
    assert 0.01 < module.rpb.std() < 0.03
    without = CLASSES[rank - 1](embed_dim=24, num_heads=3, kernel_size=5, qkv_bias=False)
    assert set(without.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    assert without.rpb is None


def test_old_checkpoints_load():
    """As a model of the 0.14 generation saves its attention layers."""
    checkpoint = {
        "qkv.weight": torch.randn(96, 32),
        "qkv.bias": torch.randn(96),
        "proj.weight": torch.randn(32, 32),
        "proj.bias": torch.randn(32),
        "rpb": torch.randn(4, 13, 13),
    }
    module = natten.NeighborhoodAttention2D(
        32,
        kernel_size=7,
        dilation=None,
        num_heads=4,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.1,
        bias=True,
    )
    module.load_state_dict(checkpoint)
    assert torch.equal(module.rpb, checkpoint["rpb"])
    assert module.eval()(torch.randn(1, 7, 9, 32)).shape == (1, 7, 9, 32)


def test_constructors_of_both_generations():
    first = natten.NeighborhoodAttention2D(
        dim=32,
        num_heads=4,
        kernel_size=[3, 5],
        dilation=[2, 1],
        is_causal=False,
        rel_pos_bias=False,
        use_experimental_ops=True,
    )
    second = natten.NeighborhoodAttention2D(32, 4, (3, 5), 1, (2, 1), False, True, None, 0.0)
    third = natten.NeighborhoodAttention2D(
        embed_dim=32, num_heads=4, kernel_size=(3, 5), dilation=(2, 1)
    )
    for module in (second, third):
        module.load_state_dict(first.state_dict())
    x = torch.randn(1, 8, 9, 32)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), third(x))
    for module in (first, second, third):
        assert module.kernel_size == (3, 5)
        assert module.dilation == (2, 1)
        assert module.is_causal == (False, False)
        assert module.scale == 8**-0.5


def test_scale_and_boundary():
    x = torch.randn(1, 9, 16)
    module = natten.NeighborhoodAttention1D(16, 2, 3, qk_scale=0.0, boundary="valid")
    assert module.scale == 0.0
    assert module(x).shape == (1, 7, 16)


def test_dropout():
    x = torch.randn(1, 9, 16)
    module = natten.NeighborhoodAttention1D(16, 2, 3, attn_drop=0.1)
    with pytest.raises(NotImplementedError, match=r"attn_drop = 0.1"):
        module(x)
    assert module.eval()(x).shape == x.shape
    module = natten.NeighborhoodAttention1D(16, 2, 3, proj_drop=0.999)
    assert (module(x) == 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_heads": 2, "kernel_size": 3}, r"dim \(or embed_dim\) = None"),
        ({"dim": 16, "embed_dim": 16, "num_heads": 2, "kernel_size": 3}, r"embed_dim = 16"),
        ({"dim": 15, "num_heads": 2, "kernel_size": 3}, r"dim = 15; wanted a multiple of 2"),
        ({"dim": 16, "kernel_size": 3}, r"num_heads = None"),
        ({"dim": 16, "num_heads": 2}, r"kernel_size = None"),
        (
            {"dim": 16, "num_heads": 2, "kernel_size": (3, 3)},
            r"kernel_size = \(3, 3\); wanted one value, or 1",
        ),
        ({"dim": 16, "num_heads": 2, "kernel_size": -1, "bias": True}, r"kernel_size = -1"),
    ],
)
def test_wrong_constructors(settings, match):
    with pytest.raises(ValueError, match=match):
        natten.NeighborhoodAttention1D(**settings)


def test_wrong_inputs():
    module = natten.NeighborhoodAttention2D(16, 2, 5)
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D: x.ndim = 3; wanted 4"):
        module(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D: x.shape\[-1\] = 8; wanted 16"):
        module(torch.randn(1, 9, 9, 8))
    with pytest.raises(
        ValueError, match=r"kernel_size\[0\] \* dilation\[0\] = 5 \* 1; wanted at most 4"
    ):
        module(torch.randn(1, 4, 9, 16))


def test_copies_and_prints():
    module = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 5, 16)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), module(x))
    assert "kernel_size=(3, 3)" in repr(module)
    assert module.half().bfloat16()(x.bfloat16()).dtype == torch.bfloat16
