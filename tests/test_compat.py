# SPDX-License-Identifier: MIT
"""The older API: every name of it is there, and what the old signatures compute is what brute force says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import natten
from natten import functional, legacy
from tests import oracle, oracle_unfused
from tests.cases import Problem
from tests.oracle import assert_close

pytestmark = [
    pytest.mark.cpu,  # names and signatures
    pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning"),
]

# What programs written for either generation of the package ask for, by module.
NAMES = {
    "natten": """
        HAS_LIBNATTEN __version__ attention merge_attentions na1d na2d na3d neighborhood_attention_generic
        NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D
        use_fused_na use_fna is_fused_na_enabled is_fna_enabled
        use_kv_parallelism_in_fused_na is_kv_parallelism_in_fused_na_enabled
        set_memory_usage_preference get_memory_usage_preference
        is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted
        use_deterministic_algorithms are_deterministic_algorithms_enabled
        use_autotuner disable_autotuner is_autotuner_enabled
        is_autotuner_enabled_for_forward is_autotuner_enabled_for_backward
        is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward
        use_tiled_na use_gemm_na use_tf32_in_gemm_na is_tiled_na_enabled is_gemm_na_enabled is_tf32_in_gemm_na_enabled
        enable_tf32 disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na
        use_flex_attention force_flex_attention
        allow_flex_compile allow_flex_compile_backprop disable_flex_compile disable_flex_compile_backprop
        is_flex_compile_allowed is_flex_compile_backprop_allowed
        has_cuda has_half has_bfloat has_gemm has_fna has_fused_na has_tf32_gemm has_fp32_gemm has_fp64_gemm
        context experimental flex flops functional libnatten modules natten1d natten2d natten3d types utils varlen
    """,
    "natten.functional": """
        na1d na2d na3d na1d_qk na2d_qk na3d_qk na1d_av na2d_av na3d_av attention merge_attentions
        neighborhood_attention_generic na1d_qk_with_bias na2d_qk_with_bias na3d_qk_with_bias
        natten1dqkrpb natten2dqkrpb natten3dqkrpb natten1dqk natten2dqk natten3dqk natten1dav natten2dav natten3dav
        FusedNeighborhoodAttention1D FusedNeighborhoodAttention2D FusedNeighborhoodAttention3D
    """,
    "natten.context": "NattenContext AutotunerContext set_memory_usage_preference use_kv_parallelism_in_fused_na",
    "natten.experimental": "na1d na2d na3d",
    "natten.flex": "flex_na1d flex_na2d flex_na3d",
    "natten.flops": """
        fna_flop_count na_qk_flop_count na_av_flop_count add_natten_handle get_flops qk_1d_rpb_flop qk_2d_rpb_flop
        qk_3d_rpb_flop av_1d_flop av_2d_flop av_3d_flop
    """,
    "natten.libnatten": " ".join(
        f"na{rank}d{half}_{direction}"
        for rank in (1, 2, 3)
        for half in ("", "_qk", "_av")
        for direction in ("forward", "backward")
    )
    + " has_cuda has_gemm get_tiled_na set_tiled_na get_gemm_na set_gemm_na get_gemm_tf32 set_gemm_tf32 compute_delta",
    "natten._libnatten": "compute_delta",
    "natten.natten1d": "NeighborhoodAttention1D",
    "natten.natten2d": "NeighborhoodAttention2D",
    "natten.natten3d": "NeighborhoodAttention3D",
    "natten.types": """
        DimensionType DimensionTypeOrDed CausalArgType CausalArgTypeOrDed Dimension3DTypeOrDed CausalArg3DTypeOrDed
        KernelSchedule
    """,
    "natten.utils": """
        check_all_args check_kernel_size_arg check_dilation_arg check_causal_arg check_input_size_arg get_num_na_weights
        check_tiling_config check_backward_tiling_config check_additional_keys check_additional_values log
        make_attn_tensor_from_input get_device_cc
    """,
    "natten.utils.checks": "check_all_args check_kernel_size_arg check_dilation_arg check_causal_arg",
    "natten.utils.log": "get_logger",
    "natten.utils.testing": """
        skip_if_cuda_is_not_supported skip_if_gemm_is_not_supported skip_if_fna_is_not_supported
        skip_if_gemm_does_not_support_double_precision fna_supports_additional_kv
    """,
    "natten.utils.varlen": "generate_varlen_parameters",
    "natten.varlen": "neighborhood_attention_varlen",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there(module):
    found = importlib.import_module(module)
    for name in NAMES[module].split():
        assert hasattr(found, name), f"{module}.{name}"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_that_are_functions_now(rank):
    """natten.na2d is a function, and what 0.17 kept in the module of that name is imported from there all the same."""
    name, old = f"na{rank}d", f"NeighborhoodAttention{rank}D"
    function = getattr(natten, name)
    for line in (f"from natten.{name} import {old} as found", f"from natten.{name} import *"):
        names: dict[str, object] = {}
        exec(line, names)  # noqa: S102
        assert names.get("found", names.get(old)) is getattr(natten, old)
    module = importlib.import_module(f"natten.{name}")
    assert module is sys.modules[f"natten.{name}"]
    assert getattr(module, name) is function
    assert getattr(natten, name) is function
    assert importlib.util.find_spec(f"natten.{name}").name == f"natten.{name}"
    assert old in dir(module)
    with pytest.raises(ImportError, match=f"cannot import name 'nope' from 'natten.{name}'"):
        exec(f"from natten.{name} import nope", {})  # noqa: S102
    assert pickle.loads(pickle.dumps(function)) is function
    assert inspect.getmodule(function) is functional


def test_former_modules_after_a_reload():
    code = (
        "import importlib, natten\n"
        "function = natten.na2d\n"
        "import natten.na2d\n"
        "assert natten.na2d is function\n"
        "importlib.reload(natten)\n"
        "from natten.na2d import NeighborhoodAttention2D\n"
        "assert natten.na2d is function\n"
        "from natten.na2d import na2d\n"
        "assert na2d is function\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("natten.na2d.NeighborhoodAttention2D is an old name") <= 1


def test_names_are_exported():
    lazy = set(natten._LAZY) | {"context", "functional", "modules"}
    assert set(NAMES["natten"].split()) - lazy <= set(natten.__all__)
    assert set(NAMES["natten.functional"].split()) <= set(functional.__all__)


@pytest.mark.parametrize(
    "module",
    [
        "natten.flops",
        "natten.legacy",
        "natten.libnatten",
        "natten.unfused",
        "natten.utils.checks",
        "natten.utils.log",
        "natten.utils.varlen",
        "natten.varlen",
    ],
)
def test_examples(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_import_says_nothing_and_leaves_gpus_alone():
    code = """if True:
        import ctypes, torch
        assert not torch.cuda.is_initialized()
        def touched(*args, **kwargs):
            raise AssertionError("import natten touches the GPU")
        for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_capability"):
            setattr(torch.cuda, name, touched)
        class Library(ctypes.CDLL):
            def __init__(self, name, *args, **kwargs):
                assert "cuda" not in str(name), name
                super().__init__(name, *args, **kwargs)
        ctypes.CDLL = Library
        import natten
        for name in natten._LAZY:
            if name not in ("natten1d", "natten2d", "natten3d"):  # importing these is deprecated, and they say so
                getattr(natten, name)
        natten.use_autotuner(True, True)
        natten.use_fused_na(True)
        natten.set_memory_usage_preference("unrestricted")
        natten.use_kv_parallelism_in_fused_na(True)
        assert not torch.cuda.is_initialized()
    """
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def plain(grid, kernel_size, dilation, is_causal=False, **others):
    rank = len(grid)

    def each(value):
        return value if isinstance(value, tuple) else (value,) * rank

    whole = tuple((0, extent) for extent in grid)
    window = (each(kernel_size), each(1), each(dilation), each(is_causal), each("shift"), each(0))
    return Problem(grid, *window, whole, whole, head_dim=5, head_dim_value=5, **others)


# Name, what follows the tensors (by position, by name), and the kernel size and dilation that are meant.
QK_FORMS = [
    ("natten1dqkrpb", (2,), {}, 3, 2, True),
    ("natten1dqkrpb", (), {"dilation": 2}, 3, 2, True),
    ("natten1dqkrpb", (5, 2), {}, 5, 2, True),
    ("natten1dqkrpb", (5, None), {}, 5, 1, False),
    ("natten1dqkrpb", (), {"kernel_size": 3, "dilation": 3}, 3, 3, False),
    ("natten2dqkrpb", (2,), {}, (3, 3), 2, True),
    ("natten2dqkrpb", (3, 2), {}, 3, 2, True),
    ("natten2dqkrpb", (3,), {"dilation": 2}, 3, 2, True),
    ("natten2dqkrpb", ((3, 5), (2, 1)), {}, (3, 5), (2, 1), False),
    ("natten3dqkrpb", (3, 5, 2, 1), {}, (3, 5, 5), (2, 1, 1), True),
    ("natten3dqkrpb", (3, 1), {}, 3, 1, True),
    (
        "natten3dqkrpb",
        (),
        {"kernel_size_d": 5, "kernel_size": 3, "dilation_d": 1, "dilation": 2},
        (5, 3, 3),
        (1, 2, 2),
        False,
    ),
    ("natten1dqk", (3, 2), {}, 3, 2, None),
    ("natten2dqk", (3, 2), {}, 3, 2, None),
    ("natten2dqk", (), {"kernel_size": 5, "dilation": 1}, 5, 1, None),
    ("natten3dqk", (3, 5, 2, 1), {}, (3, 5, 5), (2, 1, 1), None),
    ("na1d_qk_with_bias", (3, 2), {}, 3, 2, True),
    ("na2d_qk_with_bias", (3, 2), {}, 3, 2, True),
    ("na3d_qk_with_bias", (3, 5, 2, 1), {}, (3, 5, 5), (2, 1, 1), True),
]
AV_FORMS = [
    ("natten1dav", (2,), {}, 5, 2),
    ("natten1dav", (5, 2), {}, 5, 2),
    ("natten1dav", (), {"kernel_size": 3, "dilation": 3}, 3, 3),
    ("natten2dav", (2,), {}, 3, 2),
    ("natten2dav", (3, 2), {}, 3, 2),
    ("natten2dav", ((3, 5), (2, 1)), {}, (3, 5), (2, 1)),
    ("natten3dav", (3, 5, 2, 1), {}, (3, 5, 5), (2, 1, 1)),
    ("natten3dav", (3, 1), {}, 3, 1),
]
GRIDS = {"1": (17,), "2": (10, 9), "3": (6, 7, 8)}


def grid_of(name):
    return GRIDS[next(letter for letter in name if letter.isdigit())]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def agree(function, expected_function, *tensors, cotangent_seed=1):
    """Results and all gradients; expected in float64 from the tensors that the function gets."""
    inputs, exact = leaves(*tensors), leaves(*tensors)
    result, expected = function(*inputs), expected_function(*exact)
    assert_close(result, expected, 1e-12)
    cotangent = torch.randn(
        expected.shape,
        generator=torch.Generator().manual_seed(cotangent_seed),
        dtype=expected.dtype,
    )
    result.backward(cotangent)
    expected.backward(cotangent)
    for mine, theirs in zip(inputs, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine.grad, theirs.grad, 1e-12)


@pytest.mark.parametrize(("name", "given", "named", "kernel_size", "dilation", "bias"), QK_FORMS)
def test_old_forms_of_qk(name, given, named, kernel_size, dilation, bias):
    problem = plain(grid_of(name), kernel_size, dilation, has_rpb=bool(bias), batch=2)
    query, key, *_, rpb = oracle_unfused.heads_first(problem.operands(torch.float64))
    function = getattr(functional, name)

    def old(query, key, rpb):
        tensors = (query, key) if bias is None else (query, key, rpb)
        return function(*tensors, *given, **named)

    agree(old, lambda q, k, b: oracle_unfused.qk(problem, q, k, None, b), query, key, rpb)


@pytest.mark.parametrize(("name", "given", "named", "kernel_size", "dilation"), AV_FORMS)
def test_old_forms_of_av(name, given, named, kernel_size, dilation):
    problem = plain(grid_of(name), kernel_size, dilation, batch=2)
    value = oracle_unfused.heads_first(problem.operands(torch.float64))[2]
    attn = torch.randn(*value.shape[:-1], math.prod(problem.kernel_size), dtype=torch.float64)
    function = getattr(functional, name)
    agree(
        lambda attn, value: function(attn, value, *given, **named),
        lambda attn, value: oracle_unfused.av(problem, attn, value),
        attn,
        value,
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("by_name", [False, True])
def test_additional_tokens_in_the_forms_of_0_15(rank, by_name):
    problem = plain(GRIDS[str(rank)], 3, 2, has_rpb=True, additional=4)
    query, key, value, more_keys, more_values, rpb = oracle_unfused.heads_first(
        problem.operands(torch.float64)
    )
    numbers = (3, 3, 2, 2) if rank == 3 else (3, 2)
    extra_keys = ((), {"additional_keys": more_keys}) if by_name else ((more_keys,), {})
    extra_values = ((), {"additional_values": more_values}) if by_name else ((more_values,), {})
    qk = getattr(functional, f"na{rank}d_qk_with_bias")
    av = getattr(functional, f"natten{rank}dav")
    attn = qk(query, key, rpb, *numbers, *extra_keys[0], **extra_keys[1])
    assert_close(attn, oracle_unfused.qk(problem, query, key, more_keys, rpb), 1e-12)
    attn = attn.softmax(-1)
    output = av(attn, value, *numbers, *extra_values[0], **extra_values[1])
    assert_close(output, oracle_unfused.av(problem, attn, value, more_values), 1e-12)


def test_calls_that_no_release_understood():
    query = torch.randn(1, 2, 9, 4)
    attn = torch.randn(1, 2, 4, 4, 8)
    for call, said in (
        (lambda: functional.natten1dqkrpb(query, query, None, 1), "no bias table"),
        (lambda: functional.natten1dqkrpb(query, query, None), "kernel_size, dilation"),
        (lambda: functional.natten1dqkrpb(query, query, None, 3, 1, 1), "kernel_size, dilation"),
        (lambda: functional.natten1dqkrpb(query, query, None, window=3), "window=3"),
        (lambda: functional.natten2dav(attn, torch.randn(1, 2, 4, 4, 3), 1), "square"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_old_names_warn_once_with_the_new_name():
    legacy.warn_once.cache_clear()
    query = torch.randn(1, 2, 9, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            attn = functional.natten1dqkrpb(query, query, None, 3, 1)
            functional.natten1dav(attn, query, 3, 1)
    said = [(str(w.message), w.category, w.filename) for w in caught]
    assert len(said) == 2, said
    for (message, category, filename), old, new in zip(
        said, ("natten1dqkrpb", "natten1dav"), ("na1d_qk", "na1d_av"), strict=True
    ):
        assert category is DeprecationWarning
        assert f"natten.functional.{old} is an old name: use natten.functional.{new}(" in message
        assert filename == __file__


@pytest.mark.parametrize(
    ("use", "old", "new"),
    [
        ("from natten.natten2d import NeighborhoodAttention2D", "natten.natten2d", "natten."),
        ("from natten.flops import qk_2d_rpb_flop", "qk_2d_rpb_flop", "natten.flops.qk_flop"),
        ("from natten.flops import av_1d_flop", "av_1d_flop", "natten.flops.av_flop"),
    ],
)
def test_old_places_warn_once_with_the_new_place(use, old, new):
    code = f"import warnings\nwarnings.simplefilter('always')\n{use}\n{use}\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stderr.count("DeprecationWarning") == 1, result.stderr
    assert old in result.stderr
    assert f"use {new}" in result.stderr
    assert "<string>" in result.stderr  # the line that imports, and not one of the package


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused_by_the_arguments_of_0_17(rank):
    problem = plain(GRIDS[str(rank)], 3, 2, has_rpb=True)
    query, key, value, *_, rpb = problem.operands(torch.float64)
    expected, _ = oracle.dense(problem, (query, key, value, None, None, rpb))
    class_ = getattr(functional, f"FusedNeighborhoodAttention{rank}D")
    apply = class_.apply(query, key, value, rpb, 3, 2, False, 5**-0.5, ((8,), (8,)), None)
    assert_close(apply, expected, 1e-12)
    experimental = getattr(natten.experimental, f"na{rank}d")
    assert_close(experimental(query, key, value, 3, 2, False, rpb), expected, 1e-12)

    causal = plain(GRIDS[str(rank)], 3, 2, is_causal=True)
    expected, _ = oracle.dense(causal, (query, key, value, None, None, None))
    flex = getattr(natten.flex, f"flex_na{rank}d")
    assert_close(flex(query, key, value, 3, 2, True), expected, 1e-12)
