# SPDX-License-Identifier: MIT
"""natten.context: defaults, what the switches change, what they refuse; and what can be asked about devices."""

from __future__ import annotations

import threading

import pytest
import torch

import natten
from natten import _dispatch, functional
from natten.context import AutotunerContext, MemoryUsagePreference, NattenContext

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def untouched():
    """Settings as at import, before and after."""
    yield
    NattenContext.reset()
    AutotunerContext.reset()


# Each switch, its query, and what that says at import.
FLAGS = [
    (natten.use_fused_na, natten.is_fused_na_enabled, True),
    (natten.use_fna, natten.is_fna_enabled, True),
    (natten.use_kv_parallelism_in_fused_na, natten.is_kv_parallelism_in_fused_na_enabled, True),
    (natten.use_deterministic_algorithms, natten.are_deterministic_algorithms_enabled, False),
    (natten.use_gemm_na, natten.is_gemm_na_enabled, True),
    (natten.use_tiled_na, natten.is_tiled_na_enabled, True),
    (natten.use_tf32_in_gemm_na, natten.is_tf32_in_gemm_na_enabled, False),
    (natten.allow_flex_compile, natten.is_flex_compile_allowed, False),
    (natten.allow_flex_compile_backprop, natten.is_flex_compile_backprop_allowed, False),
]


@pytest.mark.parametrize(("switch", "query", "default"), FLAGS)
def test_flags(switch, query, default):
    assert query() is default
    for mode in (not default, default):
        switch(mode)
        assert query() is mode
    switch()
    assert query() is True
    with pytest.raises(ValueError, match="mode"):
        switch("yes")
    assert query() is True
    NattenContext.reset()
    assert query() is default


def test_switches_that_say_what_they_were_set_to():
    pairs = [
        (natten.enable_gemm_na, natten.disable_gemm_na, natten.is_gemm_na_enabled),
        (natten.enable_tiled_na, natten.disable_tiled_na, natten.is_tiled_na_enabled),
        (natten.enable_tf32, natten.disable_tf32, natten.is_tf32_in_gemm_na_enabled),
    ]
    for enable, disable, query in pairs:
        assert disable() is False
        assert query() is False
        assert enable() is True
        assert query() is True
    natten.allow_flex_compile(True, backprop=True)
    natten.disable_flex_compile_backprop()
    assert (natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()) == (
        True,
        False,
    )
    natten.allow_flex_compile(True, backprop=True)
    natten.disable_flex_compile()
    assert (natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()) == (
        False,
        False,
    )


def test_memory_preference():
    queries = {
        "default": natten.is_memory_usage_default,
        "strict": natten.is_memory_usage_strict,
        "unrestricted": natten.is_memory_usage_unrestricted,
    }
    assert natten.is_memory_usage_default()
    for name in ("unrestricted", "strict", "default"):
        natten.set_memory_usage_preference(name)
        assert natten.get_memory_usage_preference() is MemoryUsagePreference[name.capitalize()]
        assert [query() for query in queries.values()] == [key == name for key in queries]
    with pytest.raises(ValueError, match="'strict'"):
        natten.set_memory_usage_preference("a little")


def test_autotuner_settings():
    assert not natten.is_autotuner_enabled()
    natten.use_autotuner(True, steps_forward=7)
    assert natten.is_autotuner_enabled()
    assert natten.is_autotuner_enabled_for_forward()
    assert not natten.is_autotuner_enabled_for_backward()
    natten.use_autotuner(backward_pass=True, thorough_mode_backward=True)  # the rest stays
    assert natten.is_autotuner_enabled_for_forward()
    assert natten.is_autotuner_enabled_for_backward()
    assert natten.is_autotuner_thorough_for_backward()
    assert not natten.is_autotuner_thorough_for_forward()
    assert AutotunerContext.steps_forward == 7
    with pytest.raises(ValueError, match="steps_forward"):
        natten.use_autotuner(False, steps_forward=0)
    with pytest.raises(ValueError, match="forward_pass"):
        natten.use_autotuner(1)
    assert natten.is_autotuner_enabled_for_forward()
    natten.disable_autotuner()
    assert not natten.is_autotuner_enabled()
    assert not natten.is_autotuner_thorough_for_backward()


def test_the_autotuner_is_not_deterministic():
    natten.use_autotuner(True, True)
    natten.use_deterministic_algorithms()
    assert not natten.is_autotuner_enabled()
    with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
        natten.use_autotuner(True)
    natten.use_autotuner(False)
    natten.use_deterministic_algorithms(False)
    natten.use_autotuner(True)


# What switches change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in NattenContext._defaults if name != "training_memory_preference"]
)
def test_settings_can_be_assigned(name):
    """Directly, as by their switches: choices that were made before are made anew."""
    default = getattr(NattenContext, name)
    x = torch.randn(1, 12, 2, 8)

    def chosen():
        return [natten.explain(x, x, x, 3, op=op).selected.backend for op in ("attention", "qk")]

    before, planned = chosen(), natten.na1d(x, x, x, 3)
    setattr(NattenContext, name, not default)
    assert getattr(NattenContext, name) is not default
    expected = {"force_flex_attention": ["flex", "gemm"], "is_gemm_na_enabled": ["fna", "naive"]}
    assert chosen() == expected.get(name, before)
    assert torch.allclose(natten.na1d(x, x, x, 3), planned, atol=1e-5)
    NattenContext.reset()
    assert getattr(NattenContext, name) is default
    assert chosen() == before


def test_assigned_settings_reach_what_was_planned_before(monkeypatch):
    ran = []
    original = natten._C.unfused
    monkeypatch.setattr(
        natten._C,
        "unfused",
        lambda problem, op, kernel, *rest: (
            ran.append(kernel),
            original(problem, op, kernel, *rest),
        )[1],
    )
    query = torch.randn(1, 2, 12, 8)
    for _ in range(2):
        functional.na1d_qk(query, query, 3)
    NattenContext.is_gemm_na_enabled = False
    functional.na1d_qk(query, query, 3)
    assert [name.partition("_")[0] for name in ran] == ["gemm", "gemm", "naive"]


def test_force_flex_attention():
    x = torch.randn(1, 12, 2, 8)
    before = natten.na1d(x, x, x, 3)
    assert natten.explain(x, x, x, kernel_size=3).selected.backend == "fna"
    natten.force_flex_attention()
    explanation = natten.explain(x, x, x, kernel_size=3)
    assert explanation.selected.backend == "flex"
    assert "force_flex_attention() was called" in str(explanation)
    assert torch.allclose(natten.na1d(x, x, x, 3), before, atol=1e-5)
    # It is no candidate where gradients on a CPU are wanted, and nothing else stands in.
    with pytest.raises(NotImplementedError, match="force_flex_attention"):
        natten.na1d(x.clone().requires_grad_(), x, x, 3)
    assert natten.explain(x, x, x, kernel_size=3, backend="fna").selected.backend == "fna"
    natten.use_fused_na()
    assert natten.explain(x, x, x, kernel_size=3).selected.backend == "fna"
    assert torch.equal(natten.na1d(x, x, x, 3), before)


def test_flex_attention_is_a_candidate_without_being_asked_for():
    natten.use_flex_attention()
    x = torch.randn(1, 12, 2, 8)
    explanation = natten.explain(x, x, x, kernel_size=3)
    assert explanation.selected.backend == "fna"
    assert "flex" in {candidate.backend for candidate in explanation.candidates}


def selected(op, **settings):
    x = torch.randn(1, 12, 2, 8)
    return natten.explain(x, x, x, kernel_size=3, op=op, **settings).selected.backend


def test_use_gemm_na():
    before = selected("qk"), selected("av")
    natten.use_gemm_na(False)
    assert (selected("qk"), selected("av")) == ("naive", "naive")
    query, key, value = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    attn = functional.na1d_qk(query, key, 3).softmax(-1)
    functional.na1d_av(attn, value, 3).sum().backward()  # gradients, too, find a kernel
    natten.use_gemm_na(True)
    assert (selected("qk"), selected("av")) == before
    if "gemm" in before:
        natten.use_gemm_na(False)
        assert selected("qk", backend="gemm") == "gemm"


def test_use_fused_na():
    module = natten.NeighborhoodAttention1D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 12, 16)
    ran = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "natten":
                ran.append(function._opname)
            return function(*args, **(kwargs or {}))

    with Ops():
        fused = module(x)
        natten.use_fused_na(False)
        unfused = module(x)
    assert ran == ["forward", "qk", "av"]
    assert torch.allclose(fused, unfused, atol=1e-6)


def test_switches_in_compiled_functions():
    module = natten.NeighborhoodAttention1D(16, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(1, 12, 16)
    expected = compiled(x)
    switches = (
        lambda: natten.use_autotuner(True, True),
        lambda: natten.use_fused_na(False),
        lambda: natten.use_gemm_na(False),
    )
    for switch in switches:
        switch()
        assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_tf32_of_unfused_operations():
    before = torch.backends.cuda.matmul.allow_tf32
    assert _dispatch.allows_tf32("qk") is before
    natten.use_tf32_in_gemm_na(not before)
    assert _dispatch.allows_tf32("qk") is not before
    assert _dispatch.allows_tf32("forward") is before  # of fused attention, torch says it
    assert natten.is_tf32_in_gemm_na_enabled() is not before


def test_switches_hold_for_all_threads():
    natten.use_gemm_na(False)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(natten.is_gemm_na_enabled()))
    thread.start()
    thread.join()
    assert seen == [False]


# Queries ------------------------------------------------------------------------------------------------------------

QUERIES = (
    natten.has_half,
    natten.has_bfloat,
    natten.has_gemm,
    natten.has_fna,
    natten.has_fused_na,
    natten.has_fp32_gemm,
    natten.has_tf32_gemm,
    natten.has_fp64_gemm,
)


def test_queries_of_the_cpu():
    assert natten.has_half("cpu")
    assert natten.has_bfloat("cpu")
    assert natten.has_fna("cpu")
    assert natten.has_fused_na(torch.device("cpu"))
    assert not natten.has_tf32_gemm("cpu")
    gemm = [k for k in natten._C.kernels() if k.backend == "gemm" and k.op == "qk"]
    assert natten.has_gemm("cpu") is bool(gemm)
    assert natten.has_fp32_gemm("cpu") is any("float32" in k.dtypes for k in gemm)
    assert natten.has_fp64_gemm("cpu") is any("float64" in k.dtypes for k in gemm)


def test_queries_of_what_is_not_there():
    for query in QUERIES:
        assert query("mps") is False
        assert isinstance(query(), bool)
    if not torch.cuda.is_available():
        assert natten.has_cuda() is False
        for query in QUERIES:
            assert query("cuda") is False
            assert query(0) is False
            assert query() is query("cpu")
        assert natten.utils.get_device_cc() == 0
