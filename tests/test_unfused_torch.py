# SPDX-License-Identifier: MIT
"""The unfused ops as torch sees them: opcheck, derivatives of any order, vmap, compile, autocast, FLOPs, nested tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import _C
from natten.functional import na1d_av, na1d_qk, na2d_av, na2d_qk
from tests import oracle, oracle_unfused
from tests.cases import random_problem
from tests.oracle import assert_close
from tests.test_torch import TRANSFORMS, leaves
from tests.test_unfused import COMPILED, av, halves, qk, random

# torch's own code under compile, export and vmap warns of things that are not ours; nested tensors, of being new.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:torch",
        "ignore::FutureWarning:torch",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
        "ignore:The PyTorch API of nested tensors:UserWarning",
    ),
]

FULL = random(("rank2", "rpb", "additional", "gqa", "zeros"), 1)
FULL = replace(FULL, head_dim=8, head_dim_value=8, magnitude=1.0, strided=False, batch=2)


def heads_first(problem, dtype):
    return oracle_unfused.heads_first(problem.operands(dtype))


# Ops ------------------------------------------------------------------------------------------------------------------


def op_calls(dtype):
    """Each op, and arguments for it."""
    axes = list(as_axes(FULL))
    query, key, _, _, _, rpb = heads_first(FULL, dtype)
    weights = torch.randn(*query.shape[:-1], math.prod(FULL.kernel_size)).to(dtype)
    ops = torch.ops.natten
    return {
        "qk": (ops.qk.default, (query, key, rpb, axes, False)),
        "qk without bias": (ops.qk.default, (query, key, None, axes, True)),
        "av": (ops.av.default, (weights, key, axes)),
        "av_transposed": (ops.av_transposed.default, (weights, query, axes, FULL.heads_kv)),
        "rpb_gradient": (ops.rpb_gradient.default, (weights, axes)),
    }


def as_axes(problem):
    from natten._problem import QkOperands, describe, normalize_qk

    tokens = torch.empty(1, 1, *problem.grid, 1)
    infos = describe(QkOperands(tokens, tokens))
    names = ("kernel_size", "stride", "dilation", "is_causal", "boundary", "offset")
    arguments = (getattr(problem, name) for name in names)
    return normalize_qk(infos, len(problem.grid), *arguments).flat_axes


@pytest.mark.parametrize("backend", ["auto", "naive", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", op_calls(torch.float32))
def test_opcheck(name, dtype, backend):
    op, arguments = op_calls(dtype)[name]
    torch.library.opcheck(op, (*leaves_of(arguments), backend))


def leaves_of(arguments):
    return [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]


# Derivatives ----------------------------------------------------------------------------------------------------------


def scalar(query_key, attn_value):
    def function(x, rpb):
        x = x.transpose(1, 2)
        logits = query_key(x, x * 0.5, rpb)
        finite = logits.masked_fill(logits == -math.inf, 0)
        attn = logits.softmax(-1)
        return attn_value(attn, x.sin()).sin().sum() + (finite**2).sum() + (attn**2).sum()

    return function


def of_ops(backend):
    return scalar(
        lambda q, k, rpb: na1d_qk(q, k, 3, is_causal=True, rpb=rpb, backend=backend),
        lambda attn, v: na1d_av(attn, v, 3, is_causal=True, backend=backend),
    )


def brute_force():
    def problem(length):
        small = random_problem(("rank1",), 0)
        window = {"kernel_size": (3,), "stride": (1,), "dilation": (1,), "offset": (0,)}
        box = ((0, length),)
        boxes = {"grid": (length,), "query_box": box, "key_box": box}
        return replace(small, **window, **boxes, is_causal=(True,), boundary=("shift",))

    for length in (4, 6):  # tensors made inside a transform must not outlive it
        oracle_unfused.slots(problem(length))
    return scalar(
        lambda q, k, rpb: oracle_unfused.qk(problem(q.shape[2]), q, k, None, rpb),
        lambda attn, v: oracle_unfused.av(problem(v.shape[2]), attn, v),
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["naive", "reference"])
def test_transform(transform, backend):
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    rpb = torch.randn(2, 5, dtype=torch.float64)
    results = TRANSFORMS[transform](of_ops(backend))(x, rpb)
    expected = TRANSFORMS[transform](brute_force())(x, rpb)
    flat = torch.utils._pytree.tree_leaves
    for result, right in zip(flat(results), flat(expected), strict=True):
        assert_close(result, right, 1e-10 * max(1.0, right.abs().max().item()), transform)


@pytest.mark.parametrize(
    "features",
    [
        ("rank2", "rpb", "zeros"),
        ("rank2", "additional", "gqa"),
        ("rank1", "causal", "dilation", "even"),
        ("rank3", "valid", "rpb"),
        ("rank2", "mask", "stride"),
    ],
    ids="-".join,
)
def test_gradcheck(features):
    """First and second derivatives, in both modes, of the halves apart: their operands are independent."""
    problem = random(features, 21)
    small = {"head_dim": 2, "head_dim_value": 2, "magnitude": 1.0, "batch": 1, "heads_kv": 1}
    problem = replace(problem, **small, heads=problem.heads // problem.heads_kv)
    query, key, value, more_keys, more_values, rpb = heads_first(problem, torch.float64)

    def finite_qk(query, key, more_keys, rpb):
        logits = qk(problem, query, key, more_keys, rpb, backend="naive")
        return logits.masked_fill(logits == -math.inf, 0)

    def some(function, tensors):
        def of_present(*tensors_given):
            given = iter(tensors_given)
            return function(*(None if t is None else next(given) for t in tensors))

        return of_present, [t for t in leaves(tensors) if t is not None]

    attn = torch.randn_like(finite_qk(query, key, more_keys, rpb))
    fast = {"fast_mode": True, "atol": 1e-4}
    for function, tensors in (
        some(finite_qk, (query, key, more_keys, rpb)),
        some(lambda *t: av(problem, *t, backend="naive"), (attn, value, more_values)),
    ):
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, **fast)
        assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("backend", COMPILED)
def test_second_derivatives_through_float32(backend):
    operands = leaves(heads_first(FULL, torch.float32))
    doubles = leaves([t.double() for t in operands])
    results = []
    for tensors, name in ((operands, backend), (doubles, "reference")):
        output, lse = halves(FULL, name)(*tensors)
        gradients = torch.autograd.grad(output.sin().sum() + lse.sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in gradients), tensors))
    for result, right in zip(*results, strict=True):
        assert_close(result, right, 1e-4 * right.abs().max().item())


def test_tangents_of_empty_slots():
    """-inf is constant: its tangent is 0."""
    x = torch.randn(1, 1, 4, 3)
    logits, tangent = jvp(lambda x: na1d_qk(x, x, 3, is_causal=True), (x,), (x,))
    assert (tangent[logits == -math.inf] == 0).all()
    present = logits != -math.inf
    assert_close(tangent[present], 2 * logits[present], 1e-5)


def test_only_some_inputs_need_gradients():
    operands = heads_first(FULL, torch.float32)
    everything = leaves(operands)
    full = torch.autograd.grad(halves(FULL)(*everything)[0].sum(), everything)
    for i in range(6):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(operands)]
        (alone,) = torch.autograd.grad(halves(FULL)(*some)[0].sum(), some[i])
        assert_close(alone, full[i], 1e-5 * full[i].abs().max().item())


def test_the_same_every_time():
    torch.set_num_threads(2)
    operands = heads_first(FULL, torch.float32)
    first = oracle.run(halves(FULL), operands)
    for _ in range(3):
        for result, right in zip(oracle.run(halves(FULL), operands), first, strict=True):
            assert torch.equal(result, right)


# Compilation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [
        ("rank1", "causal"),
        ("rank2", "rpb", "additional"),
        ("rank3", "gqa"),
        ("rank2", "valid"),
    ],
    ids="-".join,
)
def test_compile(features, counter):
    problem = random(features, 3)
    operands = heads_first(problem, torch.float32)

    def function(*tensors):
        output, lse = halves(problem)(*(None if t is None else t * 1.0 for t in tensors))
        return output.sin(), lse

    expected = oracle.run(function, operands)
    results = oracle.run(torch.compile(function, fullgraph=True, backend=counter), operands)
    assert counter.frame_count == 1
    for name, result, right in zip(oracle.NAMES, results, expected, strict=True):
        if right is not None:
            assert_close(result, right, 1e-5 * max(1.0, right.abs().max().item()), name)


def test_compile_by_inductor(counter):
    x = torch.randn(2, 2, 6, 6, 8, requires_grad=True)

    def function(x):
        attn = na2d_qk(x * 2, x + 1, 3).softmax(-1)
        return na2d_av(attn, x.sin(), 3).cos().sum()

    (expected,) = torch.autograd.grad(function(x), x)
    (result,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(x), x)
    assert_close(result, expected, 1e-5)


def test_compile_for_every_size_at_once(counter):
    def function(x):
        return na2d_av(na2d_qk(x, x, 3, is_causal=(True, False)).softmax(-1), x, 3)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch, height, width in ((2, 5, 7), (3, 6, 8), (5, 9, 11)):
        x = torch.randn(batch, 2, height, width, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(compiled(x).sin().sum(), x)
        (expected,) = torch.autograd.grad(function(x).sin().sum(), x)
        assert_close(gradient, expected, 1e-5)
    assert counter.frame_count <= 2  # once for the first size, once for all others


def test_a_compiled_function_obeys_the_backend_in_force(counter, monkeypatch):
    used = watch(monkeypatch, 2)
    compiled = torch.compile(lambda x: na1d_qk(x, x, 3), fullgraph=True, backend=counter)
    x = torch.randn(1, 1, 8, 4)
    compiled(x)
    with natten.use_backend("naive"):
        compiled(x)
    assert used[-1].startswith("naive_qk")
    assert counter.frame_count == 1


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return na2d_av(na2d_qk(x, x, 3).softmax(-1), x, 3)

    x = torch.randn(2, 2, 7, 8, 16)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(Model(), (x,), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"natten.qk.default", "natten.av.default"} <= targets
    more = torch.randn(5, 2, 7, 8, 16)
    assert_close(program.module()(more), Model()(more), 1e-6)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning")
def test_jit_trace():
    def function(x):
        return na2d_av(na2d_qk(x, x, 3).softmax(-1), x, 3)

    x = torch.randn(2, 2, 7, 8, 16)
    traced = torch.jit.trace(function, (x,))
    other = torch.randn_like(x)
    assert torch.equal(traced(other), function(other))


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.empty(2, 4, 5, 6, 8, device="meta")
    attn = na2d_qk(x, x[:, :2], 3)
    assert attn.shape == (2, 4, 5, 6, 9)
    assert na2d_av(attn, x[:, :2], 3).device.type == "meta"
    with FakeTensorMode():
        fake = torch.empty(2, 4, 5, 6, 8, requires_grad=True)
        rpb = torch.empty(4, 5, 5, requires_grad=True)
        na2d_av(na2d_qk(fake, fake, 3, rpb=rpb), fake, 3).sum().backward()
        assert fake.grad.shape == fake.shape
        assert rpb.grad.shape == rpb.shape


# Autocast, FLOPs, threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Tokens and weights are cast, the bias table is not; gradients come back in the operands' types."""
    query, key, value, more_keys, more_values, rpb = heads_first(FULL, torch.float32)
    low = [t.to(dtype) for t in (query, key, value, more_keys, more_values)]
    attn = qk(FULL, low[0], low[1], low[3], rpb)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        result = qk(FULL, query, key, more_keys, rpb)
        assert result.dtype == dtype
        assert torch.equal(result, attn)
        weights = result.float().softmax(-1)
        output = av(FULL, weights, value, more_values)
    assert torch.equal(output, av(FULL, weights.to(dtype), low[2], low[4]))
    inputs = leaves((query, key, value, more_keys, more_values, rpb))
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        output = halves(FULL)(*inputs)[0]
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert gradient.dtype == tensor.dtype


def test_autocast_leaves_float64_alone():
    query, key, value, *_ = heads_first(FULL, torch.float64)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        attn = qk(FULL, query, key)
        assert attn.dtype == torch.float64
        assert av(FULL, attn, value).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bias_table_of_another_type(dtype):
    query, key, _, _, _, rpb = heads_first(FULL, torch.float32)
    table = rpb.to(dtype).requires_grad_()
    attn = qk(FULL, query, key, rpb=table, backend="naive")
    right = qk(FULL, query, key, rpb=table.detach().float(), backend="naive")
    assert torch.equal(attn, right)
    (gradient,) = torch.autograd.grad(attn.masked_fill(attn == -math.inf, 0).sum(), table)
    assert gradient.dtype == dtype


def test_flops():
    """2 for every attended pair and channel, additional keys included, in each half; twice that for its gradients."""
    operands = leaves(heads_first(FULL, torch.float32))
    attends, _, _ = oracle.mask(FULL)
    pairs = int(attends.sum()) + len(attends) * FULL.additional
    half = 2 * FULL.batch * FULL.heads * pairs * 8
    with FlopCounterMode(display=False) as counter:
        output = halves(FULL)(*operands)[0]
    assert counter.get_total_flops() == 2 * half
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 4 * half


def watch(monkeypatch, argument):
    """That argument of every call of the core."""
    seen = []
    original = _C.unfused
    monkeypatch.setattr(
        _C, "unfused", lambda *given: (seen.append(given[argument]), original(*given))[1]
    )
    return seen


def test_the_number_of_threads_is_obeyed(monkeypatch):
    asked = watch(monkeypatch, -4)  # before arch, stream and workspace
    x = torch.randn(1, 1, 8, 4)
    for number in (1, 2):
        torch.set_num_threads(number)
        na1d_av(na1d_qk(x, x, 3), x, 3)
    assert asked == [1, 1, 2, 2]


# Nested tensors: samples of different sizes, for inference --------------------------------------------------------------


@pytest.mark.parametrize("additional", [False, True])
def test_nested(additional):
    grids = ((5, 9), (6, 7), (3, 3))
    tokens = [torch.randn(3, 4, *grid, 8) for grid in grids]
    query, key, value = (torch.nested.nested_tensor([t[i] for t in tokens]) for i in range(3))
    rpb = torch.randn(4, 5, 5)
    more = torch.randn(3, 4, 2, 8)
    nested_more = torch.nested.nested_tensor(list(more)) if additional else None
    settings = {"kernel_size": 3, "is_causal": (False, True)}
    attn = na2d_qk(query, key, rpb=rpb, additional_keys=nested_more, **settings)
    output = na2d_av(attn, value, additional_values=nested_more, **settings)
    assert attn.size(0) == output.size(0) == 3
    for i, of_sample in enumerate(tokens):
        query, key, value = of_sample[:, None].unbind()
        extra = more[i : i + 1] if additional else None
        right = na2d_qk(query, key, rpb=rpb, additional_keys=extra, **settings)
        assert torch.equal(attn[i], right[0])
        assert torch.equal(output[i], na2d_av(right, value, additional_values=extra, **settings)[0])


def test_jagged():
    """What comes out can be added to what went in."""
    samples = [torch.randn(length, 4, 8) for length in (5, 9, 3)]
    x = torch.nested.nested_tensor(samples, layout=torch.jagged)
    tokens = x.transpose(1, 2)
    attn = na1d_qk(tokens, tokens, 3)
    total = x + na1d_av(attn.softmax(-1), tokens, 3).transpose(1, 2)
    for sample, result in zip(samples, total.unbind(), strict=True):
        dense = sample.transpose(0, 1)[None]
        right = na1d_av(na1d_qk(dense, dense, 3).softmax(-1), dense, 3)
        assert torch.equal(result, sample + right[0].transpose(0, 1))
    shorter = na1d_qk(tokens, tokens, 3, boundary="valid")
    assert [t.shape for t in shorter.unbind()] == [(4, 3, 3), (4, 7, 3), (4, 1, 3)]


def test_wrong_nested_tensors():
    samples = [torch.randn(4, length, 8) for length in (5, 9)]
    nested, dense = torch.nested.nested_tensor(samples), torch.randn(2, 4, 9, 8)
    with pytest.raises(ValueError, match="wanted all nested, or none"):
        na1d_qk(nested, dense, 3)
    with pytest.raises(ValueError, match="wanted all nested, or none"):
        na1d_av(dense[..., :3], nested, 3)
    with pytest.raises(ValueError, match="rpb = nested; wanted a dense tensor"):
        na1d_qk(nested, nested, 3, rpb=nested)
    with pytest.raises(ValueError, match=r"batch sizes = \[2, 1\]"):
        na1d_qk(nested, torch.nested.nested_tensor(samples[:1]), 3)
    with pytest.raises(ValueError, match=r"without gradients: use torch.no_grad\(\)"):
        na1d_qk(nested, nested.clone().requires_grad_(), 3)
    with pytest.raises(
        ValueError, match=r"kernel_size\[0\] \* dilation\[0\] = 7 \* 1; wanted at most 5"
    ):
        na1d_qk(nested, nested, 7)
