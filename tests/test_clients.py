# SPDX-License-Identifier: MIT
"""Programs that call natten, in the forms in which they call it: transformers itself, the others in a few lines.

What they compute is compared, with all gradients, to the same program on brute force. All weights are random.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import pytest
import torch
from torch import nn

import natten
from natten import _C, functional
from tests import oracle, oracle_unfused
from tests.oracle import assert_close
from tests.test_compat import plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning"),
]

UNFUSED_OPS = {"qk", "av", "av_transposed", "rpb_gradient"}
# Backends that compute these with all gradients.
UNFUSED = tuple(
    backend
    for backend in dict.fromkeys(kernel.backend for kernel in _C.kernels())
    if {kernel.op for kernel in _C.kernels() if kernel.backend == backend} >= UNFUSED_OPS
)
# Types with a kernel of the backend, and what their results may be off by.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
BACKENDS = [
    (backend, dtype)
    for backend in ("auto", *UNFUSED, "reference")
    for dtype in TOLERANCES
    if backend != "gemm" or dtype == torch.float32
]


def brute_qk(query, key, rpb, kernel_size, dilation, is_causal=False):
    return oracle_unfused.qk(window(query, kernel_size, dilation, is_causal), query, key, None, rpb)


def brute_av(attn, value, kernel_size, dilation, is_causal=False):
    return oracle_unfused.av(window(value, kernel_size, dilation, is_causal), attn, value)


def window(tensor, kernel_size, dilation, is_causal):
    """The problem of a tensor [batch, heads, *grid, head_dim]."""
    return plain(tuple(tensor.shape[2:-1]), kernel_size, dilation, is_causal)


def brute_fused(query, key, value, kernel_size, dilation=1, is_causal=False, scale=None, stride=1):
    """Heads last."""
    grid = tuple(query.shape[1:-2])
    problem = plain(grid, kernel_size, dilation, is_causal)
    strides = stride if isinstance(stride, tuple) else (stride,) * len(grid)
    problem = type(problem)(**{**vars(problem), "stride": strides})
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    problem = type(problem)(**{**vars(problem), "scale": scale})
    return oracle.dense(problem, (query, key, value, None, None, None))[0]


def outcome(model, x):
    """Everything that the model returns, and the gradients of its input and parameters, in float64."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    results = model(x)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients or not list(model.parameters())
    named = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return {**named, "input": x.grad, **gradients}


def assert_same(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        size = max(1.0, tensor.abs().max().item())
        assert_close(mine[name], tensor, tolerance * size, name)


# transformers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    """DiNAT's and NAT's modules, which call natten2dqkrpb and natten2dav by position, on permuted views."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        models = importlib.import_module("transformers").models
        return {
            "dinat": (
                importlib.import_module("transformers.models.dinat.modeling_dinat"),
                models.dinat.configuration_dinat.DinatConfig,
                "DinatForImageClassification",
            ),
            "nat": (
                importlib.import_module("transformers.models.deprecated.nat.modeling_nat"),
                importlib.import_module(
                    "transformers.models.deprecated.nat.configuration_nat"
                ).NatConfig,
                "NatForImageClassification",
            ),
        }


class Classifier(nn.Module):
    """An image classifier that returns its attention weights, too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        outputs = self.model(images, output_attentions=True)
        return (outputs.logits, *outputs.attentions)


def classifier(transformers, name):
    module, config, class_ = transformers[name]
    settings = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "kernel_size": 3}
    if name == "dinat":
        settings["dilations"] = [[1, 4], [1, 2]]
    settings |= {"num_labels": 5, "drop_path_rate": 0.0, "layer_scale_init_value": 0.1}
    model = getattr(module, class_)(config(**settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # bias tables are zero at first
    return Classifier(model)


# 52 x 48 pixels are 13 x 12 tokens: groups of different length. 40 x 36 are too few for DiNAT, which pads them itself.
@pytest.mark.parametrize("size", [(52, 48), (40, 36)])
@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_transformers(transformers, name, size, monkeypatch):
    model = classifier(transformers, name).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = {}
    for backend, dtype in BACKENDS:
        with natten.use_backend(backend):
            found[backend, dtype] = outcome(copy.deepcopy(model).to(dtype), images.to(dtype))
    module = transformers[name][0]
    monkeypatch.setattr(module, "natten2dqkrpb", brute_qk)
    monkeypatch.setattr(module, "natten2dav", brute_av)
    expected = outcome(model.double(), images)
    assert len(expected) > 40  # logits, weights of four layers, and a gradient for every parameter
    for (_, dtype), results in found.items():
        assert_same(results, expected, TOLERANCES[dtype])


def test_transformers_as_a_user_calls_it(transformers):
    """No backend named, float32, one training step, and checkpoints that load."""
    model = classifier(transformers, "dinat").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randn(2, 3, 52, 48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("self.rpb") for name in before)
    model(images)[0].logsumexp(-1).sum().backward()
    optimizer.step()
    assert any((model.state_dict()[name] != tensor).any() for name, tensor in before.items())
    model.load_state_dict(before)


# k-diffusion: packed qkv, cosine similarity with a learned scale, and scale=1.0 --------------------------------------


class HourglassBlock(nn.Module):
    def __init__(self, fused, brute=False):
        super().__init__()
        self.qkv = nn.Linear(24, 3 * 24, bias=False)
        self.out = nn.Linear(24, 24, bias=False)
        self.scale = nn.Parameter(torch.full((3,), 10.0))
        self.fused = fused
        self.brute = brute

    def similar(self, tensor, scale):
        return tensor * (torch.sqrt(scale) / tensor.norm(dim=-1, keepdim=True))

    def forward(self, x):
        packed = self.qkv(x).unflatten(-1, (3, 3, 8))
        if self.fused:
            query, key, value = packed.permute(
                3, 0, 1, 2, 4, 5
            )  # [3, batch, height, width, heads, 8]
            scale = self.scale[:, None]
            query, key = self.similar(query, scale), self.similar(key, scale)
            if self.brute:
                x = brute_fused(query, key, value, 7, scale=1.0)
            else:
                x = functional.na2d(query, key, value, 7, scale=1.0)
        else:
            query, key, value = packed.permute(
                3, 0, 4, 1, 2, 5
            )  # [3, batch, heads, height, width, 8]
            scale = self.scale[:, None, None, None]
            query, key = self.similar(query, scale), self.similar(key, scale)
            attn = functional.na2d_qk(query, key, 7)
            attn = torch.softmax(attn, dim=-1).to(value.dtype)
            x = functional.na2d_av(attn, value, 7).movedim(1, -2)
        return self.out(x.flatten(-2))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_k_diffusion(dtype):
    assert natten.has_fused_na()
    exact = HourglassBlock(fused=True, brute=True).double()
    x = torch.randn(2, 9, 10, 24, dtype=torch.float64)
    expected = outcome(exact, x)
    for fused in (True, False):
        block = HourglassBlock(fused).to(dtype)
        block.load_state_dict(exact.state_dict())
        assert_same(outcome(block, x.to(dtype)), expected, TOLERANCES[dtype])


# All-in-one: dilations that double from layer to layer, on long sequences with heads of 12 channels -------------------


class Dilated(nn.Module):
    """One attention in time, by the old names or by brute force."""

    def __init__(self, dilation, qkrpb, av):
        super().__init__()
        self.rpb = nn.Parameter(torch.zeros(2, 9))
        self.dilation, self.qkrpb, self.av = dilation, qkrpb, av

    def forward(self, x):
        query, key, value = x.unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        attn = self.qkrpb(query / math.sqrt(12), key, self.rpb, 5, self.dilation).softmax(-1)
        return self.av(attn, value, 5, self.dilation).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("dilation", [1, 64, 2048])
def test_allin1_in_time(dilation):
    x = torch.randn(1, 5 * 2048 + 30, 72, dtype=torch.float64)
    rpb = torch.randn(2, 9, dtype=torch.float64)
    expected = None
    for qkrpb, av in ((brute_qk, brute_av), (functional.natten1dqkrpb, functional.natten1dav)):
        model = Dilated(dilation, qkrpb, av).double()
        model.rpb.data.copy_(rpb)
        found = outcome(model, x)
        if expected is None:
            expected = found
        else:
            assert_same(found, expected, 1e-10)
            for backend in ("auto", *UNFUSED):
                with natten.use_backend(backend):
                    assert_same(outcome(model.float(), x.float()), expected, 1e-4)


def test_allin1_over_instruments():
    """Four instruments, padded to the five that the window needs, times time."""
    query, key, value = torch.randn(3, 2, 2, 4, 33, 12, dtype=torch.float64)
    query, key, value = (nn.functional.pad(t, (0, 0, 0, 0, 0, 1)) for t in (query, key, value))
    rpb = torch.randn(2, 9, 9, dtype=torch.float64)
    attn = functional.natten2dqkrpb(query, key, rpb, 5, 1)
    assert_close(attn, brute_qk(query, key, rpb, 5, 1), 1e-12)
    attn = attn.softmax(-1)
    assert_close(functional.natten2dav(attn, value, 5, 1), brute_av(attn, value, 5, 1), 1e-12)


# NAF: keys of a coarser grid, repeated; values with more channels; a dilation per axis --------------------------------


def test_naf():
    factors, window = (2, 3), (3, 3)
    query = torch.randn(1, 2, 8, 12, 6, requires_grad=True)
    coarse_key, coarse_value = torch.randn(1, 2, 4, 4, 6), torch.randn(1, 2, 4, 4, 10)
    key, value = (
        t.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3).requires_grad_()
        for t in (coarse_key, coarse_value)
    )
    tensors = (query, key, value)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    attn = brute_qk(exact[0] * 6**-0.5, exact[1], None, window, factors).softmax(-1)
    expected = brute_av(attn, exact[2], window, factors)
    cotangent = torch.randn(expected.shape)
    gradients = torch.autograd.grad(expected, exact, cotangent.double())

    def unfused(query, key, value):
        attn = functional.na2d_qk(query * 6**-0.5, key, kernel_size=window, dilation=factors)
        return functional.na2d_av(attn.softmax(-1), value, kernel_size=window, dilation=factors)

    def fused(query, key, value):
        query, key, value = (t.permute(0, 2, 3, 1, 4) for t in (query, key, value))
        output = natten.na2d(
            query,
            key,
            value,
            kernel_size=window,
            dilation=factors,
            stride=1,
            backend="cutlass-fna",
        )
        return output.permute(0, 3, 1, 2, 4)

    for function in (unfused, fused):
        output = function(*tensors)
        assert_close(output, expected, 1e-5)
        for mine, theirs in zip(
            torch.autograd.grad(output, tensors, cotangent), gradients, strict=True
        ):
            assert_close(mine, theirs, 1e-4)


# Video models -------------------------------------------------------------------------------------------------------


def test_cosmos():
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    query, key, value = torch.randn(3, 1, 4, 6, 8, 2, 128)
    settings = {"kernel_size": (-1, 4, 6), "stride": (1, 2, 3), "dilation": (1, 1, 1)}
    output = functional.neighborhood_attention_generic(
        query=query,
        key=key,
        value=value,
        **settings,
        is_causal=(False, False, False),
        scale=None,
        backend="hopper-fna",
        q_tile_shape=(2, 8, 8),
        kv_tile_shape=(4, 4, 8),
        backward_q_tile_shape=(2, 4, 8),
        backward_kv_tile_shape=(2, 4, 8),
        run_persistent_kernel=True,
        kernel_schedule="pp",
    )
    expected = brute_fused(
        query.double(), key.double(), value.double(), (4, 4, 6), stride=(1, 2, 3)
    )
    assert_close(output, expected, 1e-5)
    natten.context.NattenContext.reset()


def test_cosmos_with_packed_sequences():
    """Grouped queries, bounds of the sequences on their device, LSE."""
    lengths, bounds = (5, 9), torch.tensor([0, 5, 14], dtype=torch.int32)
    query, key, value = torch.randn(1, 14, 4, 16), *torch.randn(2, 1, 14, 2, 16)
    output, lse = functional.attention(
        query,
        key,
        value,
        cumulative_seqlen_Q=bounds,
        cumulative_seqlen_KV=bounds,
        max_seqlen_Q=9,
        max_seqlen_KV=9,
        return_lse=True,
        backend="cutlass-fmha",
        backward_use_pt_reduction=False,
    )
    assert lse.shape == (1, 14, 4)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        heads_first = (t[:, part].movedim(2, 1).double() for t in (query, key, value))
        expected = nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
        assert_close(output[:, part], expected.movedim(1, 2), 1e-5)
        begin += length


def test_ltx():
    """An even number of frames, bf16, scale=1.0 and no backend."""
    query, key, value = torch.randn(3, 1, 4, 5, 6, 2, 32).bfloat16()
    query = query * 32**-0.5
    output = natten.na3d(query, key, value, kernel_size=(2, 3, 5), scale=1.0, backend=None)
    tensors = (query.double(), key.double(), value.double())
    assert_close(output, brute_fused(*tensors, (2, 3, 5), scale=1.0), 0.02)


# Vision and weather models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_overlock(dtype):
    """Weights that a convolution makes, in channels, and values in channels: both views, neither contiguous."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Conv2d(8, 2 * 25, 1)
            self.value = nn.Conv2d(8, 2 * 4, 1)
            self.av = functional.na2d_av

        def forward(self, x):
            attn = self.weight(x).unflatten(1, (2, 25)).softmax(2).permute(0, 1, 3, 4, 2)
            value = self.value(x).unflatten(1, (2, 4)).permute(0, 1, 3, 4, 2)
            assert not attn.is_contiguous()
            assert not value.is_contiguous()
            return self.av(attn, value, kernel_size=5).permute(0, 1, 4, 2, 3).flatten(1, 2)

    model = Mixer().double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    model.av = lambda attn, value, kernel_size: brute_av(attn, value, kernel_size, 1)
    expected = outcome(model, x)
    model.av = functional.na2d_av
    found = outcome(model.to(dtype), x.to(dtype))
    assert_same(found, expected, TOLERANCES[dtype])


def test_stylenat():
    """Two groups of heads with a window each; switches at import."""
    natten.use_fused_na(True)
    natten.use_autotuner(True, True)
    query, key, value = torch.randn(3, 1, 4, 8, 9, 5, dtype=torch.float64)
    rpbs = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    chunks = zip(*(t.chunk(2, dim=1) for t in (query, key, value)), rpbs, (1, 2), strict=True)
    for q, k, v, rpb, dilation in chunks:
        attn = functional.na2d_qk(q, k, kernel_size=3, dilation=dilation, rpb=rpb)
        assert_close(attn, brute_qk(q, k, rpb, 3, dilation), 1e-12)
        attn = attn.softmax(-1)
        output = functional.na2d_av(attn, v, kernel_size=3, dilation=dilation)
        assert_close(output, brute_av(attn, v, 3, dilation), 1e-12)
    natten.context.AutotunerContext.reset()


def test_nat_by_its_authors():
    """As their classification models build it: dilation=None, and a bias by either name."""
    settings = {"num_heads": 2, "qkv_bias": True, "qk_scale": None, "attn_drop": 0.0}
    settings |= {"proj_drop": 0.0, "kernel_size": 3, "dilation": None}
    flag = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}
    block = natten.NeighborhoodAttention2D(16, **settings, **flag)
    older = natten.NeighborhoodAttention2D(16, **settings, bias=True)
    older.load_state_dict(block.state_dict())
    x = torch.randn(1, 6, 7, 16)
    assert torch.equal(block(x), older(x))


def test_weather_models():
    """earth2studio's list of kernel sizes, physicsnemo's rearranged views, WeatherMesh's class and checks."""
    assert natten.HAS_LIBNATTEN
    block = natten.NeighborhoodAttention2D(16, num_heads=2, kernel_size=[3, 5], qkv_bias=False)
    assert block(torch.randn(1, 6, 7, 16)).shape == (1, 6, 7, 16)

    packed = torch.randn(1, 42, 3, 2, 8)  # [batch, tokens, 3, heads, 8]
    views = packed.permute(2, 0, 1, 3, 4).unflatten(2, (6, 7))
    output = functional.na2d(*views, [3, 5], dilation=1, is_causal=False)
    assert_close(output, brute_fused(*views.double(), (3, 5)), 1e-5)

    window = natten.utils.check_all_args(3, (3, 3, 3), 1, False)
    kernel_size, dilation, is_causal = window
    query, key, value = torch.randn(3, 1, 4, 5, 6, 2, 8)
    output = functional.FusedNeighborhoodAttention3D.apply(
        query, key, value, None, kernel_size, dilation, is_causal, 8**-0.5, None, None
    )
    assert_close(output, brute_fused(query.double(), key.double(), value.double(), 3), 1e-5)


def test_segman():
    """A scale of its own for fused attention, and old and new names in one file."""
    query, key, value = torch.randn(3, 1, 7, 8, 2, 4)
    output = functional.na2d(query, key, value, kernel_size=3, dilation=2, scale=float(4**0.5))
    expected = brute_fused(query.double(), key.double(), value.double(), 3, 2, scale=2.0)
    assert_close(output, expected, 1e-5)
    handles = {"prim::PythonOp.NATTEN2DQKRPBFunction": natten.flops.qk_2d_rpb_flop}
    counter = pytest.importorskip("fvcore.nn").FlopCountAnalysis(nn.Identity(), query)
    natten.flops.add_natten_handle(counter.set_op_handle(**handles))
