# SPDX-License-Identifier: MIT
"""The modules: constructors of both generations, checkpoints, and what they compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import natten
from natten import functional
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


def test_projection_dropout():
    module = natten.NeighborhoodAttention1D(16, 2, 3, proj_drop=0.999)
    assert (module(torch.randn(1, 9, 16)) == 0).float().mean() > 0.9


def projected(module, x):
    """Query, key and value, heads first."""
    qkv = torch.nn.functional.linear(x, module.qkv.weight, module.qkv.bias)
    heads = qkv.unflatten(-1, (3, module.num_heads, module.head_dim))
    return (t.movedim(-2, 1) for t in heads.unbind(-3))


@pytest.mark.parametrize("boundary", ["shift", "zeros", "valid"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_weights(rank, boundary):
    module = CLASSES[rank - 1](24, 3, 3, rel_pos_bias=True, boundary=boundary)
    x = torch.randn(2, *GRIDS[rank - 1], 24)
    output, weights = module(x, return_weights=True)
    query, key, _ = projected(module, x)
    qk = (functional.na1d_qk, functional.na2d_qk, functional.na3d_qk)[rank - 1]
    settings = {"rpb": module.rpb, "boundary": boundary, "backend": "reference"}
    logits = qk(query * 8**-0.5, key, 3, **settings)
    assert_close(weights, logits.softmax(-1), 1e-6)
    assert_close(output, module(x), 1e-5)  # the latter fused


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_attention_dropout(rel_pos_bias):
    """In training, weights are dropped; the others grow in proportion, and the output is a sum by these."""
    module = natten.NeighborhoodAttention2D(16, 2, 3, attn_drop=0.5, rel_pos_bias=rel_pos_bias)
    x = torch.randn(2, 7, 8, 16)
    output, dropped = module(x, return_weights=True)
    module.eval()
    _, whole = module(x, return_weights=True)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close(dropped, whole * 2 * kept, 1e-6)
    _, _, value = projected(module, x)
    attended = functional.na2d_av(dropped, value, 3, backend="reference")
    assert_close(output, module.proj(attended.movedim(1, -2).flatten(-2)), 1e-5)
    module.train()(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_all_weights_dropped():
    module = natten.NeighborhoodAttention1D(16, 2, 3, attn_drop=1.0)
    output = module(torch.randn(1, 9, 16))
    assert torch.equal(output, module.proj.bias.expand_as(output))


def test_fused_where_possible():
    """Backend "fna" has no unfused kernels."""
    x = torch.randn(1, 9, 16)
    module = natten.NeighborhoodAttention1D(16, 2, 3, attn_drop=0.1, rel_pos_bias=True)
    with natten.use_backend("fna"):
        with pytest.raises(NotImplementedError, match="fna: computes forward, backward; not qk"):
            module(x)
        module.eval()
        assert module(x).shape == x.shape
        with pytest.raises(NotImplementedError, match="not qk"):
            module(x, return_weights=True)
        plain = natten.NeighborhoodAttention1D(16, 2, 3, rel_pos_bias=True)
        assert plain(x).requires_grad


def test_unfused_where_wanted(monkeypatch):
    x = torch.randn(1, 9, 16)
    module = natten.NeighborhoodAttention1D(16, 2, 3)
    fused = module(x)
    monkeypatch.setattr(module, "_fused", None)
    with pytest.raises(TypeError):
        module(x)
    natten.use_fused_na(False)
    try:
        assert_close(module(x), fused, 1e-5)
    finally:
        natten.use_fused_na()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("attn_drop", [0.0, 0.5])
def test_compile(attn_drop):
    module = natten.NeighborhoodAttention2D(16, 2, 3, attn_drop=attn_drop, rel_pos_bias=True)
    x = torch.randn(1, 5, 6, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(x).shape == x.shape
    compiled(x).sum().backward()
    assert module.rpb.grad is not None
    module.eval()
    assert_close(compiled(x), module(x), 1e-6)


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


class LowRank(torch.nn.Module):
    """A linear layer and its low-rank update."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(16, 4, bias=False)
        self.up = torch.nn.Linear(4, 48, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Transposed(torch.nn.Sequential):
    """What it returns has other strides."""

    def forward(self, x):
        return super().forward(x).movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("kind", ["low rank", "sequential", "transposed", "parametrized"])
def test_wrapped_projections(kind):
    """Whatever makes queries, keys and values will do."""
    module = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 5, 6, 16)
    expected = module(x)
    if kind == "low rank":
        module.qkv = LowRank(module.qkv)
        torch.nn.init.zeros_(module.qkv.up.weight)
        module.proj = torch.nn.Sequential(module.proj)
    elif kind == "sequential":
        module.qkv = torch.nn.Sequential(torch.nn.Identity(), module.qkv)
    elif kind == "transposed":
        module.qkv = Transposed(module.qkv)
    else:
        torch.nn.utils.parametrizations.orthogonal(module.proj)
        expected = module(x)
    assert torch.equal(module(x), expected)
    output, weights = module(x, return_weights=True)
    assert_close(output, expected, 1e-5)
    assert weights.shape == (2, 2, 5, 6, 9)
    module.qkv = torch.nn.Sequential(torch.nn.Linear(16, 32))
    match = r"qkv\(x\).shape = \(2, 5, 6, 32\); wanted \(2, 5, 6, 48\)"
    with pytest.raises(ValueError, match=match):
        module(x)
    with pytest.raises(ValueError, match=r"x.shape\[-1\] = 6; wanted 16: channels come last"):
        natten.NeighborhoodAttention2D(16, 2, 3)(x.movedim(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_device_and_dtype(dtype):
    settings = {"dim": 16, "num_heads": 2, "kernel_size": 3, "rel_pos_bias": True}
    module = natten.NeighborhoodAttention1D(**settings, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert module.rpb.abs().max() > 0
    x = torch.randn(1, 9, 16).to(dtype)
    assert module(x).dtype == dtype
    meta = natten.NeighborhoodAttention1D(**settings, device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert meta.to_empty(device="cpu").load_state_dict(module.state_dict())


# What each generation of the package keeps in its modules, beside layers, by what it is pickled as.
STATES = {
    "natten.natten2d": {"kernel_size": 3, "dilation": 2, "window_size": 6},
    "natten.na2d": {
        "kernel_size": (3, 3),
        "dilation": (2, 2),
        "is_causal": (False, False),
        "attn_drop_rate": 0.1,
    },
    "natten.modules": {
        "na_dim": 2,
        "embed_dim": 16,
        "expected_input_tensor_rank": 4,
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "dilation": (2, 2),
        "is_causal": (False, False),
    },
}


@pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning")
@pytest.mark.parametrize("path", STATES)
def test_pickled_modules_of_all_generations(path):
    old = torch.nn.Module()
    old.num_heads, old.head_dim, old.scale = 2, 8, 8**-0.5
    for name, value in STATES[path].items():
        setattr(old, name, value)
    old.qkv, old.proj = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
    old.proj_drop = torch.nn.Dropout(0.0)
    if path != "natten.modules":
        old.attn_drop = torch.nn.Dropout(0.1)
        old.rpb = torch.nn.Parameter(torch.randn(2, 5, 5))
    pickled = natten.NeighborhoodAttention2D.__new__(natten.NeighborhoodAttention2D)
    vars(pickled).update(vars(old))
    data = pickle.dumps(pickled, protocol=2)
    module = pickle.loads(data.replace(b"natten.modules", path.encode()))
    assert type(module) is natten.NeighborhoodAttention2D
    new = natten.NeighborhoodAttention2D(
        16, 2, 3, dilation=2, rel_pos_bias="rpb" in old._parameters, attn_drop=0.1
    )
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 7, 8, 16)
    assert torch.equal(module.eval()(x), new.eval()(x))
    assert_close(module(x, return_weights=True)[0], new(x), 1e-5)
    assert module.attn_drop_rate == (0.0 if path == "natten.modules" else 0.1)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(x), new(x))
    assert repr(again) == repr(module)
    if path != "natten.modules":
        assert again.extra_repr() == new.extra_repr()


def test_repr_says_what_changes_the_result():
    base = {"dim": 16, "num_heads": 2, "kernel_size": 4, "stride": 2}
    changes = (
        {"num_heads": 4},
        {"kernel_size": 5},
        {"stride": 1},
        {"dilation": 2},
        {"is_causal": True},
        {"qkv_bias": False},
        {"qk_scale": 0.5},
        {"proj_drop": 0.5},
        {"rel_pos_bias": True},
        {"attn_drop": 0.5},
        {"boundary": "mask"},
        {"offset": 1},
        {"backend": "reference"},
    )
    texts = [
        repr(natten.NeighborhoodAttention1D(**{**base, **change})) for change in ({}, *changes)
    ]
    assert len(set(texts)) == len(texts)


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
