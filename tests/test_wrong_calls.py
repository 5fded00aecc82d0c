# SPDX-License-Identifier: MIT
"""Wrong calls of everything public: each error says which argument is meant, what it was, and what is wanted."""

from __future__ import annotations

import inspect

import numpy
import pytest
import torch

import natten
from natten import experimental, flex, flops, functional, utils, varlen
from natten.context import AutotunerContext, NattenContext
from natten.utils.varlen import generate_varlen_parameters

pytestmark = [
    pytest.mark.cpu,  # messages
    pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning"),
]

NAMES = {
    **{name: getattr(natten, name) for name in natten.__all__},
    **{name: getattr(functional, name) for name in functional.__all__},
    "torch": torch,
    "tensor": torch.tensor,
    "numpy": numpy,
    "experimental": experimental,
    "flex": flex,
    "flops": flops,
    "utils": utils,
    "varlen": varlen.neighborhood_attention_varlen,
    "configure_varlen": varlen.configure_varlen,
    "generate_varlen_parameters": generate_varlen_parameters,
    "AutotunerContext": AutotunerContext,
    "NattenContext": NattenContext,
    "module": lambda **changes: natten.NeighborhoodAttention2D(
        **{"dim": 16, "num_heads": 2, "kernel_size": 3, **changes}
    ),
    "q": torch.zeros(1, 6, 8, 4, 16),
    "S": (1, 6, 8, 4, 16),
    "s": torch.zeros(1, 9, 2, 8),
    "h": torch.zeros(1, 4, 6, 8, 16),  # heads first
    "h1": torch.zeros(1, 2, 9, 8),
    "o": torch.zeros(1, 9, 2, 8),
    "l": torch.zeros(1, 9, 2),
    "G": [(4, 5), (6, 3)],
    "x": torch.zeros(1, 4 * 5 + 6 * 3, 2, 8),
}

# Each call, and how its error begins: the argument, and its value.
CALLS = {
    "na2d(q, q, q, {3, 5})": "kernel_size = {3, 5}",
    "na2d(q, q, q, {3: 3, 5: 5})": "kernel_size = {3: 3, 5: 5}",
    "na2d(q, q, q, iter([3, 3]))": "kernel_size = <list_iterator object at 0x",
    "na2d(q, q, q, frozenset([3]))": "kernel_size = frozenset({3})",
    "na2d(q, q, q, numpy.float32(3))": "kernel_size[0] = 3.0",
    "na2d(q, q, q, numpy.bool_(True))": "kernel_size[0] = np.True_",
    "na2d(q, q, q, numpy.array([3.5, 3]))": "kernel_size[0] = 3.5",
    "na2d(q, q, q, numpy.zeros((2, 2), int))": "kernel_size = [[0 0]\n [0 0]]",
    "na2d(q, q, q, tensor(True))": "kernel_size[0] = tensor(True)",
    "na2d(q, q, q, tensor(3.0))": "kernel_size[0] = tensor(3.)",
    "na2d(q, q, q, tensor([3.0, 3.0]))": "kernel_size[0] = 3.0",
    "na2d(q, q, q, tensor([[3, 3]]))": "kernel_size = tensor([[3, 3]])",
    "na2d(q, q, q, tensor([3, 3, 3]))": "kernel_size = tensor([3, 3, 3])",
    'na2d(q, q, q, tensor(3, device="meta"))': "kernel_size[0] = tensor(..., device='meta', size=(), dtype=torch.int64)",
    'na2d(q, q, q, b"33")': "kernel_size[0] = b'33'",
    "na2d(q, q, q, [[3], [3]])": "kernel_size[0] = [3]",
    "na2d(q, q, q, [3, None])": "kernel_size[1] = None",
    "na2d(q, q, q, [])": "kernel_size = ()",
    "na2d(q, q, q, 1j)": "kernel_size[0] = 1j",
    "na2d(q, q, q, 2**70)": "kernel_size[0] * dilation[0] = 1180591620717411303424",
    "na2d(q, q, q, -(2**70))": "kernel_size[0] = -1180591620717411303424",
    'na2d(q, q, q, 2**15, dilation=2**15, boundary="mask")': "kernel_size[0] * dilation[0] = 1073741824",
    "na2d(q, q, q, -1, stride=9)": "stride[0] = 9",
    "na2d(q, q, q, -1, stride=0)": "stride[0] = 0",
    "na2d(q, q, q, -1, offset=1)": "offset[0] = 1",
    "na2d(q, q, q, 3, stride={1, 2})": "stride = {1, 2}",
    "na2d(q, q, q, 3, stride=1.0)": "stride[0] = 1.0",
    "na2d(q, q, q, 3, dilation={1: 2})": "dilation = {1: 2}",
    "na2d(q, q, q, 3, dilation=-1)": "dilation[0] = -1",
    "na2d(q, q, q, 3, offset=None)": "offset[0] = None",
    "na2d(q, q, q, 3, offset={0})": "offset = {0}",
    'na2d(q, q, q, 3, is_causal="no")': "is_causal[0] = 'no'",
    "na2d(q, q, q, 3, is_causal=[True])": "is_causal = (True,)",
    "na2d(q, q, q, 3, is_causal={True, False})": "is_causal = {False, True}",
    "na2d(q, q, q, 3, is_causal=tensor([1, 0]))": "is_causal[0] = 1",
    "na2d(q, q, q, 3, is_causal=tensor([[True, False]]))": "is_causal = tensor([[ True, False]])",
    "na2d(q, q, q, 3, is_causal=numpy.int64(1))": "is_causal[0] = 1",
    "na2d(q, q, q, 3, is_causal=[tensor([True]), True])": "is_causal[0] = tensor([True])",
    "na2d(q, q, q, 3, boundary=None)": "boundary[0] = None",
    'na2d(q, q, q, 3, boundary={"mask"})': "boundary = {'mask'}",
    'na2d(q, q, q, 3, boundary="Shift")': "boundary[0] = 'Shift'",
    'na2d(q, q, q, 3, boundary=["shift"])': "boundary = ('shift',)",
    "na2d(q, q, q, 3, grid=7)": "grid[1] = 7",
    "na2d(q, q, q, 3, grid=0)": "grid[0] = 0",
    "na2d(q, q, q, 3, grid=(7, 8))": "query_origin = None",
    "na2d(q, q, q, 3, grid=(7, 8), query_origin=0)": "key_origin = None",
    "na2d(q, q, q, 3, grid=(7, 8), key_origin=0)": "query_origin = None",
    "na2d(q, q, q, 3, grid=(6.0, 8))": "grid[0] = 6.0",
    "na2d(q, q, q, 3, grid=(6, 8), query_origin={0})": "query_origin = {0}",
    "na2d(q, q, q, 3, grid=(6, 8), query_origin=-1)": "query_origin[0] = -1",
    "na2d(q, q, q, 3, key_origin=0)": "grid = None",
    "na2d(q, q, q, 3, grid=2**40, query_origin=0, key_origin=0)": "extent[0] = 1099511627776",
    'na2d(q, q, q, 3, backend=["fna"])': "backend = ['fna']",
    "na2d(q, q, q, 3, backend={})": "backend = {}",
    'na2d(q, q, q, 3, backend="")': "backend = ''",
    "na2d(q, q, q, 3, rpb=[1])": "rpb = list",
    "na2d(q, q, q, 3, additional_keys=1, additional_values=1)": "additional_keys = int",
    "na2d(q, q, q, 3, q_tile_shape={4})": "q_tile_shape = {4}",
    "na2d(q, q, q, 3, kv_tile_shape=0)": "kv_tile_shape = 0",
    "na1d(s[:, 5:6], s, s, 3, grid=9)": "query_origin = None",
    "na1d(s[:, 5:6], s[:, 4:7], s[:, 4:7], 3, grid=9, query_origin=5)": "key_origin = None",
    "na1d(s[:, 5:6], s[:, 4:7], s[:, 4:7], 3, grid=9, key_origin=4)": "query_origin = None",
    "na2d(None, q, q, 3)": "query = NoneType",
    "na2d(q, numpy.zeros((1, 6, 8, 4, 16)), q, 3)": "key = ndarray",
    'explain(q, q, q, 3, op=["qk"])': "op = ['qk']",
    "explain(q, q, q, 3, device=3)": "device = 3",
    'explain(q, q, q, 3, device="cuda")': "device = 'cuda'",
    "explain(q, q, q, {3})": "kernel_size = {3}",
    "attention(s, s, s, is_causal=1)": "is_causal = 1",
    "attention(s, s, s, is_causal=[True])": "is_causal = (True,)",
    "attention(s, None, s)": "key = NoneType",
    "attention(s, s, s, backend=[])": "backend = []",
    "attention(s, s, s, seqlens_Q=[4, 5], seqlens_KV=[4, 5])": "seqlens_Q = [4, 5]",
    'attention(s, s, s, seqlens_Q=tensor([9], device="meta"), seqlens_KV=tensor([9]))': "seqlens_Q = tensor(..., device='meta', size=(1,), dtype=torch.int64)",
    "attention(s, s, s, seqlens_Q=tensor([-1, 10]), seqlens_KV=tensor([4, 5]))": "seqlens_Q = [-1, 10]",
    "merge_attentions(o, l)": "outputs = Tensor",
    "merge_attentions([o], l)": "lse_tensors = Tensor",
    "merge_attentions(iter([o]), [l])": "outputs = list_iterator",
    "merge_attentions([o], iter([l]))": "lse_tensors = list_iterator",
    "merge_attentions([o.int()], [l])": "outputs[0].dtype = torch.int32",
    "merge_attentions([o], [l.int()])": "lse_tensors[0].dtype = torch.int32",
    "merge_attentions([o.cfloat()], [l])": "outputs[0].dtype = torch.complex64",
    "merge_attentions([o, None], [l, l])": "outputs[1] = NoneType",
    'merge_attentions([o], [l.to("meta")])': "lse_tensors[0].device = meta",
    "merge_attentions([o.numpy()], [l])": "outputs[0] = ndarray",
    'merge_attentions({"a": o}, [l])': "outputs = dict",
    "merge_attentions(None, None)": "outputs = NoneType",
    "merge_attentions([o[0, 0, 0, 0]], [o[0, 0, 0, 0]])": "outputs[0].ndim = 0",
    "na2d_qk(h, None, 3)": "key = NoneType",
    "na2d_qk(h, h, {3})": "kernel_size = {3}",
    'na2d_qk(h, h, 3, boundary="x")': "boundary[0] = 'x'",
    "na2d_qk(h, h, 3, additional_keys=3)": "additional_keys = int",
    "na2d_av(None, h, 3)": "attn = NoneType",
    "na2d_av(h[..., :9], None, 3)": "value = NoneType",
    "natten1dqkrpb(h1, h1, [1], 1)": "natten1dqkrpb: rpb = list",
    "natten1dqkrpb(h1, h1, None, {3}, 1)": "kernel_size = {3}",
    "natten2dav(None, h, 1)": "natten2dav: attn = None",
    "experimental.na2d(q, q, q, {3})": "kernel_size = {3}",
    "flex.flex_na2d(q, q, q, {3})": "kernel_size = {3}",
    "varlen(x, x, x)": "token_layout_list = None",
    "varlen(x, x, x, token_layout_list=5)": "token_layout_list = 5",
    "varlen(x, x, x, token_layout_list=[4, 5])": "token_layout_list[0] = 4",
    "varlen(x, x, x, token_layout_list=tensor(G))": "token_layout_list = tensor([[4, 5],\n        [6, 3]])",
    "varlen(x, x, x, token_layout_list=iter(G))": "token_layout_list = <list_iterator object at 0x",
    "varlen(x, x, x, token_layout_list={(4, 5): 1})": "token_layout_list = {(4, 5): 1}",
    "varlen(x, x, x, token_layout_list=[(4, 5.5), (6, 3)])": "token_layout_list[0][1] = 5.5",
    "varlen(x, x, x, token_layout_list=[(4, -5), (6, 3)])": "token_layout_list[0] = (4, -5)",
    "varlen(x, x, x, token_layout_list=[(4, 5), (18,)])": "token_layout_list[1] = (18,)",
    "varlen(x, x, x, token_layout_list=[(1, 1, 4, 5), (6, 3)])": "token_layout_list[0] = (1, 1, 4, 5)",
    "varlen(x, x, x, token_layout_list=G, kernel_size=4)": "in grid 1 of token_layout_list, (6, 3): kernel_size[1] * dilation[1] = 4 * 1",
    "varlen(x, x, x, token_layout_list=G, kernel_size_list=3)": "kernel_size_list = 3",
    "varlen(x, x, x, token_layout_list=G, kernel_size_list=[3, 0])": "in grid 1 of token_layout_list, (6, 3): kernel_size[0] = 0",
    "varlen(x, x, x, token_layout_list=G, kernel_size_list=[3, (3, 3, 3)])": "in grid 1 of token_layout_list, (6, 3): kernel_size = (3, 3, 3)",
    "varlen(x, x, x, token_layout_list=G, kernel_size_list=[3, 2], rpb=torch.zeros(2, 5, 5))": "in grid 1 of token_layout_list, (6, 3): rpb.shape = (2, 5, 5)",
    'varlen(x, x, x, token_layout_list=G, boundary="reflect")': "in grid 0 of token_layout_list, (4, 5): boundary[0] = 'reflect'",
    'varlen(x, x, x, token_layout_list=G, backend=["fna"])': "backend = ['fna']",
    'varlen(x, x, x, token_layout_list=G, scale="x")': "in grid 0 of token_layout_list, (4, 5): scale = 'x'",
    "varlen(x, x, x, token_layout_list=G, additional_keys=x)": "in grid 0 of token_layout_list, (4, 5): additional_values = None",
    "varlen(x, x, x, {})": "metadata = dict",
    "varlen(x, x, x, configure_varlen(G, kernel_size=3), kernel_size=5)": "kernel_size = 5",
    "varlen(x, x, x, configure_varlen(G, kernel_size=3), kernel_size_list=[3, 2])": "kernel_size_list = [3, 2]",
    'varlen(x, x, x, configure_varlen(G, kernel_size=3), boundary="mask")': "boundary = mask",
    "varlen(x, x, x, configure_varlen(G, kernel_size=3), token_layout_list=[(4, 5)])": "token_layout_list = [(4, 5)]",
    "configure_varlen(G, kernel_size=3, stride=4)": "in grid 0 of token_layout_list, (4, 5): stride[0] = 4",
    'configure_varlen(G, backend="x")': "backend = 'x'",
    "generate_varlen_parameters(None, s, s, tensor([9]), tensor([9]))": "query.shape = NoneType",
    "module(kernel_size=3.5)": "kernel_size[0] = 3.5",
    "module(kernel_size=0)": "kernel_size[0] = 0",
    "module(kernel_size={3})": "kernel_size = {3}",
    "module(kernel_size=-1, dilation=2)": "dilation[0] = 2",
    "module(kernel_size=2**40)": "kernel_size[0] * dilation[0] = 1099511627776",
    "module(stride=4)": "stride[0] = 4",
    "module(stride=0)": "stride[0] = 0",
    "module(dilation=0)": "dilation[0] = 0",
    'module(dilation="x")': "dilation[0] = 'x'",
    "module(is_causal=1)": "is_causal[0] = 1",
    'module(is_causal="no")': "is_causal[0] = 'no'",
    'module(boundary="reflect")': "boundary[0] = 'reflect'",
    "module(boundary=None)": "boundary[0] = None",
    'module(boundary="valid", stride=2)': "boundary[0] = 'valid'",
    "module(offset=1)": "offset[0] = 1",
    "module(offset=None)": "offset[0] = None",
    'module(backend="cuda")': "backend = 'cuda'",
    'module(backend=["fna"])': "backend = ['fna']",
    'module(qk_scale="x")': "qk_scale = 'x'",
    "module(qk_scale=True)": "qk_scale = True",
    'module(rel_pos_bias="no")': "rel_pos_bias = 'no'",
    "module(rel_pos_bias=1)": "rel_pos_bias = 1",
    'module(bias="no")': "bias = 'no'",
    'module(qkv_bias="no")': "qkv_bias = 'no'",
    "module(proj_drop=2)": "proj_drop = 2",
    'module(proj_drop="x")': "proj_drop = 'x'",
    "module(attn_drop=1.5)": "attn_drop = 1.5",
    "module(attn_drop=None)": "attn_drop = None",
    "module(num_heads=2.0)": "num_heads = 2.0",
    "module(num_heads=True)": "num_heads = True",
    "module(num_heads=3)": "dim = 16",
    "module(dim=16.0)": "dim (or embed_dim) = 16.0",
    "module(dim=-16)": "dim (or embed_dim) = -16",
    "module(dtype=torch.int32)": "dtype = torch.int32",
    'module(dtype="float32")': "dtype = float32",
    "module()(None)": "NeighborhoodAttention2D: x = NoneType",
    "module()(x.new_zeros(1, 16, 5, 5))": "NeighborhoodAttention2D: x.shape[-1] = 5",
    "module()(x.new_zeros(1, 5, 5, 16).int())": "NeighborhoodAttention2D: x.dtype = torch.int32",
    "module()(x.new_zeros(5, 5, 16))": "NeighborhoodAttention2D: x.ndim = 3",
    'use_backend("naiv")': "backend = 'naiv'",
    'use_backend(["fna"])': "backend = ['fna']",
    "use_backend(None)": "backend = None",
    'setattr(NattenContext, "is_gemm_na_enabled", 1)': "NattenContext.is_gemm_na_enabled = 1",
    'setattr(NattenContext, "training_memory_preference", "strict")': "NattenContext.training_memory_preference = 'strict'",
    'setattr(NattenContext, "is_tf32_in_gemm_na_enabled", "yes")': "NattenContext.is_tf32_in_gemm_na_enabled = 'yes'",
    'setattr(AutotunerContext, "steps_forward", 0)': "AutotunerContext.steps_forward = 0",
    'setattr(AutotunerContext, "steps_forward", 1.5)': "AutotunerContext.steps_forward = 1.5",
    'setattr(AutotunerContext, "enabled_for_forward", 1)': "AutotunerContext.enabled_for_forward = 1",
    "use_autotuner(warmup_steps_backward=-1)": "warmup_steps_backward = -1",
    "use_fused_na(1)": "mode = 1",
    "set_memory_usage_preference(None)": "pref = None",
    'has_half("nope")': "device = 'nope'",
    "has_fna(3.5)": "device = 3.5",
    "has_gemm(True)": "device = True",
    'utils.get_device_cc("nope")': "device = 'nope'",
    "utils.check_kernel_size_arg(2, 3.5)": "kernel_size[0] = 3.5",
    "utils.check_kernel_size_arg(2, {3, 4})": "kernel_size = {3, 4}",
    "utils.check_kernel_size_arg(4, 3)": "na_dim = 4",
    'utils.check_kernel_size_arg("2", 3)': "na_dim = '2'",
    "utils.check_stride_arg(2, (3,))": "stride = (3,)",
    "utils.check_dilation_arg(2, 0)": "dilation = 0",
    "utils.check_causal_arg(2, {True})": "is_causal = {True}",
    'utils.check_causal_arg(2, "no")': "is_causal[0] = 'no'",
    "utils.check_tiling_config(2, ((8, 8), 8.5))": "tiling_config[0] = 8.5",
    "utils.check_additional_keys(h, 3)": "additional_keys = int",
    "flops.fna_flop_count(3, S, S, 3, 1, False)": "q_shape = 3",
    'flops.fna_flop_count("abcde", S, S, 3, 1, False)': "q_shape = abcde",
    "flops.fna_flop_count(S, (1, 6, 8, 4, -1), S, 3, 1, False)": "k_shape = (1, 6, 8, 4, -1)",
    "flops.fna_flop_count(S, S, (1, 6.5, 8, 4, 1), 3, 1, False)": "v_shape[1] = 6.5",
    "flops.na_qk_flop_count(S, S, {3}, 1, False)": "kernel_size = {3}",
    "flops.get_flops(None, None)": "model = NoneType",
    "flops.add_natten_handle(None)": "flop_ctr = NoneType",
}


@pytest.fixture(autouse=True)
def untouched():
    yield
    NattenContext.reset()
    AutotunerContext.reset()


@pytest.mark.parametrize("call", CALLS)
def test_error(call):
    with pytest.raises(natten.ArgumentError) as raised:
        eval(call, dict(NAMES))
    said, wanted, what = str(raised.value).partition("; wanted ")
    assert said.startswith(CALLS[call])
    assert wanted
    assert what


@pytest.mark.parametrize("name", ["nope", "is_gemm_na"])
def test_settings_that_do_not_exist(name):
    for context in (NattenContext, AutotunerContext):
        with pytest.raises(AttributeError, match=rf"has no setting '{name}': it has .*enabled"):
            setattr(context, name, True)
    with pytest.raises(AttributeError, match=r"is_gemm_na_enabled is a setting: reset\(\)"):
        del NattenContext.is_gemm_na_enabled


def test_no_function_takes_what_it_does_not_know():
    """Of the old names alone the numbers go by position and name, and they count what they are given."""
    modules = (natten, functional, varlen, experimental, flex, flops, natten.context)
    for module in modules:
        for name in module.__all__:
            found = getattr(module, name)
            if (
                inspect.isroutine(found)
                and not name.startswith("natten")
                and "with_bias" not in name
            ):
                kinds = {
                    parameter.kind for parameter in inspect.signature(found).parameters.values()
                }
                assert inspect.Parameter.VAR_KEYWORD not in kinds, name
    x, grids = NAMES["x"], NAMES["G"]
    for wrong in ("kernel_sizes", "is_casual", "grid", "query_origin", "key_origin"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            NAMES["varlen"](x, x, x, token_layout_list=grids, kernel_size=3, **{wrong: 3})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            NAMES["configure_varlen"](grids, kernel_size=3, **{wrong: 3})
