# SPDX-License-Identifier: MIT
"""na*d_qk and na*d_av: values, gradients and storage order against brute force, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import natten
from natten import _C, functional
from natten.functional import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from tests import oracle, oracle_unfused
from tests.cases import random_problem
from tests.oracle import FLOOR, assert_close

pytestmark = pytest.mark.cpu  # tests/test_unfused_policies.py has the kernels for GPUs

OPS = {"qk", "av", "av_transposed", "rpb_gradient"}
# Of the unfused ops, compiled in.
COMPILED = tuple(dict.fromkeys(kernel.backend for kernel in _C.kernels() if kernel.op in OPS))
BACKENDS = (*COMPILED, "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def types_of(backend):
    """That it computes the unfused ops of."""
    if backend == "reference":
        return set(DTYPES)
    rows = (k for k in _C.kernels() if k.backend == backend and k.op in OPS)
    return {getattr(torch, dtype) for k in rows for dtype in k.dtypes}


COMBINATIONS = [
    pytest.param(backend, dtype, id=f"{backend}-{dtype}")
    for backend in BACKENDS
    for dtype in DTYPES
    if dtype in types_of(backend)
]
QK = (na1d_qk, na2d_qk, na3d_qk)
AV = (na1d_av, na2d_av, na3d_av)
# The public functions have no boxes; the kernels' tests do. Scale is for the caller to apply.
FEATURES = [
    ("rank1", "causal", "stride"),
    ("rank1", "dilation", "mask", "additional"),
    ("rank1", "even", "zeros", "rpb"),
    ("rank2", "valid", "gqa", "value_dim"),
    ("rank2", "causal", "rpb", "strided"),
    ("rank2", "zeros", "stride", "offset", "batch"),
    ("rank2", "dilation", "even", "additional", "gqa"),
    ("rank3", "causal", "mask", "rpb"),
    ("rank3", "dilation", "value_dim", "strided", "additional"),
    ("rank3", "valid", "even", "rpb"),
]
CASES = [
    *(pytest.param(features, 1, id="-".join(features)) for features in FEATURES),
    *(pytest.param((), seed, id=f"random{seed}") for seed in range(10)),
]


def random(features, seed, large=False):
    problem = random_problem(features, seed, large)
    whole = tuple((0, extent) for extent in problem.grid)
    problem = replace(problem, query_box=whole, key_box=whole, scale=None)
    print(f"{problem}")  # noqa: T201  # shown if the test fails
    return problem


def window_of(problem):
    names = ("kernel_size", "stride", "dilation", "is_causal", "boundary", "offset")
    return {name: getattr(problem, name) for name in names}


def qk(problem, query, key, additional_keys=None, rpb=None, backend=None):
    function = QK[len(problem.grid) - 1]
    settings = {"additional_keys": additional_keys, "rpb": rpb, "backend": backend}
    return function(query, key, **window_of(problem), **settings)


def av(problem, attn, value, additional_values=None, backend=None):
    function = AV[len(problem.grid) - 1]
    settings = {"additional_values": additional_values, "backend": backend}
    return function(attn, value, **window_of(problem), **settings)


def halves(problem, backend=None):
    """Output and LSE of attention, as a function of heads-first tensors."""

    def function(query, key, value, more_keys, more_values, rpb):
        logits = qk(problem, query * problem.scale_value, key, more_keys, rpb, backend)
        return av(problem, logits.softmax(-1), value, more_values, backend), logits.logsumexp(-1)

    return function


def run(function, tensors, at_empty=math.nan):
    """The result, and the gradient of each tensor (None where there is none) for a random cotangent.

    The cotangent is NaN where the result is -inf: nothing may flow through there. In brute force, it would.
    """
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    result = function(*inputs)
    generator = torch.Generator().manual_seed(0)
    settings = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    cotangent = torch.randn(result.shape, **settings).to(result)
    cotangent = cotangent.masked_fill(result.detach() == -math.inf, at_empty)
    present = [t for t in inputs if t is not None]
    gradients = iter(torch.autograd.grad(result, present, cotangent))
    return [result.detach(), *(None if t is None else next(gradients) for t in inputs)]


def check(results, function, operands, precision=None):
    """Each result within twice the error of brute force, `function`, plus a floor.

    That is computed in the same type, or in `precision`.
    """
    dtype = precision or operands[0].dtype
    exact = run(function, doubled(operands), at_empty=0)
    lossy = run(function, [None if t is None else t.to(dtype) for t in operands], at_empty=0)
    for i, (result, right, rough) in enumerate(zip(results, exact, lossy, strict=True)):
        assert (result is None) == (right is None)
        if right is None or right.numel() == 0:
            continue
        finite = right.isfinite()
        largest = right[finite].abs().max().item() if finite.any() else 0.0
        lost = (rough.double() - right)[finite].abs().max().item() if finite.any() else 0.0
        floor = FLOOR[dtype] * torch.finfo(dtype).eps * largest
        assert_close(result, right, 2 * lost + floor + 1e-30, f"result {i}")


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def check_qk(problem, backend, dtype, device="cpu", precision=None):
    """Weights and their gradients against brute force."""
    query, key, _, more, _, rpb = oracle_unfused.heads_first(problem.operands(dtype))
    operands = query, key, more, rpb
    results = run(lambda *t: qk(problem, *t, backend=backend), on(device, operands))
    assert results[0].dtype == dtype
    check(results, lambda *t: oracle_unfused.qk(problem, *t), operands, precision)


def check_av(problem, backend, dtype, device="cpu", precision=None):
    """Weighted sums and their gradients against brute force."""
    query, key, value, more_keys, more, rpb = oracle_unfused.heads_first(problem.operands(dtype))
    logits = oracle_unfused.qk(problem, *doubled((query, key, more_keys, rpb)))
    attn = (logits * problem.head_dim**-0.5).softmax(-1).to(dtype)
    count = math.prod(problem.kernel_size)
    present = oracle_unfused.slots(problem).present.reshape(*problem.output_grid, count)
    present = torch.nn.functional.pad(present, (0, problem.additional), value=True)
    # What slots without a key hold must not matter.
    filled = attn.masked_fill(~present, math.nan)
    given = on(device, (filled, value, more))
    results = run(lambda *t: av(problem, *t, backend=backend), given)
    check(results, lambda *t: oracle_unfused.av(problem, *t), (attn, value, more), precision)
    assert (results[1].cpu()[~present.expand_as(attn)] == 0).all()


# Values and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(("features", "seed"), CASES)
def test_qk(features, seed, backend, dtype):
    check_qk(random(features, seed), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)
@pytest.mark.parametrize(("features", "seed"), CASES)
def test_av(features, seed, backend, dtype):
    check_av(random(features, seed), backend, dtype)


@pytest.mark.parametrize("seed", range(4))
def test_many_tiles(seed):
    """Larger problems on two threads, against the reference in float64."""
    problem = random((), seed, large=True)
    query, key, value, more_keys, more_values, rpb = oracle_unfused.heads_first(
        problem.operands(torch.float32)
    )
    tensors = query, key, more_keys, rpb
    exact = run(lambda *t: qk(problem, *t, backend="reference"), doubled(tensors))
    attn = (exact[0] * problem.head_dim**-0.5).softmax(-1).float()
    weighted = attn, value, more_values
    exact += run(lambda *t: av(problem, *t, backend="reference"), doubled(weighted))
    torch.set_num_threads(2)
    for backend in COMPILED:
        results = run(lambda *t, b=backend: qk(problem, *t, backend=b), tensors)
        results += run(lambda *t, b=backend: av(problem, *t, backend=b), weighted)
        for i, (result, right) in enumerate(zip(results, exact, strict=True)):
            if right is not None and right.numel():
                largest = right[right.isfinite()].abs().max().item()
                assert_close(result, right, 1e-5 * largest, f"{backend}'s result {i}")


@pytest.mark.parametrize("op", ["qk", "av"])
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_without_kernels(dtype, backend, op):
    """A backend either has kernels for a type or says that it has not."""
    x, attn = torch.randn(1, 1, 6, 8).to(dtype), torch.randn(1, 1, 6, 3).to(dtype)

    def call():
        if op == "qk":
            return na1d_qk(x, x, 3, backend=backend)
        return na1d_av(attn, x, 3, backend=backend)

    if dtype in types_of(backend):
        assert call().dtype == dtype
    else:
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(NotImplementedError, match=f"the problem is {name}"):
            call()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("backend", ["fna", *BACKENDS])
def test_the_same_as_fused(seed, backend):
    problem = random(("additional",) if seed % 2 else (), 100 + seed)
    operands = problem.operands(torch.float32)

    def fused(query, key, value, more_keys, more_values, rpb):
        return natten.neighborhood_attention_generic(
            query,
            key,
            value,
            **window_of(problem),
            additional_keys=more_keys,
            additional_values=more_values,
            rpb=rpb,
            return_lse=True,
        )

    exact = oracle.run(lambda *t: oracle.dense(problem, t), doubled(operands))
    lossy = oracle.run(lambda *t: oracle.dense(problem, t), operands)
    if backend == "fna":
        results = oracle.run(fused, operands)
    else:

        def unfused(*tensors):
            output, lse = halves(problem, backend)(*oracle_unfused.heads_first(tensors))
            return output.movedim(1, -2), lse.movedim(1, -1)

        results = oracle.run(unfused, operands)
    oracle.assert_as_good_as_dense(results, exact, lossy, torch.float32)


# Storage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_a_causal_sequence(backend):
    """By hand: keys in order, unused slots last."""
    query, key = torch.ones(1, 1, 4, 1), torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 4, 1)
    expected = torch.tensor(
        [[1, -math.inf, -math.inf], [1, 2, -math.inf], [1, 2, 3], [2, 3, 4]]
    ).reshape(1, 1, 4, 3)
    logits = na1d_qk(query, key, 3, is_causal=True, backend=backend)
    assert torch.equal(logits, expected)
    more = torch.tensor([7.0, 8]).reshape(1, 1, 2, 1)
    logits = na1d_qk(query, key, 3, additional_keys=more, is_causal=True, backend=backend)
    assert torch.equal(logits[0, 0, 0], torch.tensor([1, -math.inf, -math.inf, 7, 8]))
    output = na1d_av(logits, key, 3, 1, more, True, backend=backend)
    assert output[0, 0, 0].item() == 1 + 49 + 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_a_map(backend):
    """By hand: row-major over the window, dilated; windows of border tokens move inwards."""
    key = torch.arange(30.0).reshape(1, 1, 5, 6, 1)
    logits = na2d_qk(torch.ones_like(key), key, (2, 3), (1, 2), backend=backend)
    assert logits[0, 0, 3, 4].tolist() == [12, 14, 16, 18, 20, 22]
    assert logits[0, 0, 0, 5].tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_missing_keys(backend):
    key = torch.tensor([1.0, 2, 3]).reshape(1, 1, 3, 1)
    logits = {
        boundary: na1d_qk(torch.ones_like(key), key, 3, boundary=boundary, backend=backend)[0, 0]
        for boundary in ("mask", "zeros", "valid")
    }
    inf = -math.inf
    assert logits["mask"].tolist() == [[1, 2, inf], [1, 2, 3], [2, 3, inf]]
    assert logits["zeros"].tolist() == [[1, 2, 0], [1, 2, 3], [2, 3, 0]]
    assert logits["valid"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Packed, heads last, transposed, expanded, sliced: the same numbers, and of a wider attn without a copy."""
    packed = torch.randn(2, 5, 6, 3, 4, 8)
    query, key, value = (t.movedim(-2, 1) for t in packed.unbind(3))
    attn = na2d_qk(*(t.contiguous() for t in (query, key)), 3, backend=backend)
    output = na2d_av(attn, value.contiguous(), 3, backend=backend)
    assert torch.equal(na2d_qk(query, key, 3, backend=backend), attn)
    wide = torch.nn.functional.pad(attn, (2, 3), value=math.nan)[..., 2:-3]
    odd = attn.mT.contiguous().mT
    last = attn.movedim(1, -2).contiguous().movedim(-2, 1)
    for layout in (wide, odd, last):
        assert torch.equal(na2d_av(layout, value, 3, backend=backend), output)
    one = key[:1].expand(2, -1, -1, -1, -1)
    assert torch.equal(
        na2d_qk(query, one, 3, backend=backend), na2d_qk(query, one.clone(), 3, backend=backend)
    )


def test_no_copies(monkeypatch):
    packed = torch.randn(2, 5, 6, 3, 4, 8)
    query, key, value = (t.movedim(-2, 1) for t in packed.unbind(3))
    more = torch.randn(2, 4, 2, 8)
    odd = torch.randn(2, 4, 5, 9, 6).mT
    copies = []
    original = torch.Tensor.contiguous

    def counting(tensor, *arguments, **settings):
        copies.append(not tensor.is_contiguous())
        return original(tensor, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "contiguous", counting)
    attn = na2d_qk(query, key, 3, additional_keys=more).softmax(-1)
    na2d_av(attn, value, 3, additional_values=more)
    assert not any(copies)
    na2d_av(odd, value, 3)
    assert sum(copies) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    query = torch.randn(0, 4, 5, 6, 8, requires_grad=True)
    rpb = torch.randn(4, 5, 5, requires_grad=True)
    attn = na2d_qk(query, query, 3, rpb=rpb, backend=backend)
    assert attn.shape == (0, 4, 5, 6, 9)
    output = na2d_av(attn, query, 3, backend=backend)
    assert output.shape == query.shape
    gradients = torch.autograd.grad(output.sum(), (query, rpb))
    assert gradients[0].shape == query.shape
    assert (gradients[1] == 0).all()


def test_no_additional_keys():
    query, value = torch.randn(2, 1, 2, 9, 8).unbind()
    none = torch.randn(1, 2, 0, 8)
    attn = na1d_qk(query, query, 3)
    assert torch.equal(na1d_qk(query, query, 3, additional_keys=none), attn)
    assert torch.equal(na1d_av(attn, value, 3, additional_values=none), na1d_av(attn, value, 3))


# Backends ---------------------------------------------------------------------------------------------------------------


def test_selection():
    query = torch.randn(1, 2, 9, 8)
    attn = torch.randn(1, 2, 9, 3)
    for backend in ("fna", "flex"):
        with pytest.raises(NotImplementedError, match=rf"{backend}: computes forward.*; not qk"):
            na1d_qk(query, query, 3, backend=backend)
        with natten.use_backend(backend), pytest.raises(NotImplementedError, match="not av"):
            na1d_av(attn, query, 3)
    with natten.use_backend("flex"):
        na1d_qk(query, query, 3, backend="reference")
    with pytest.raises(ValueError, match="backend = 'no such'"):
        na1d_qk(query, query, 3, backend="no such")


@pytest.mark.parametrize("op", ["qk", "av"])
def test_explain(op):
    x = torch.randn(1, 9, 2, 8)
    explanation = natten.explain(x, x, x, 3, op=op)
    assert explanation.selected.kernel.startswith(f"{COMPILED[0]}_{op}_f32")
    assert {c.backend for c in explanation.candidates} == {*COMPILED, "fna", "flex", "reference"}
    for backend in BACKENDS:
        assert natten.explain(x, x, x, 3, op=op, backend=backend).selected.backend == backend
    assert natten.explain(x, x, x, 3, op=op, backend="fna").selected is None
    with pytest.raises(ValueError, match="op = 'backward'; wanted one of 'attention', 'qk', 'av'"):
        natten.explain(x, x, x, 3, op="backward")


def test_exports():
    for name in ("na1d_qk", "na2d_qk", "na3d_qk", "na1d_av", "na2d_av", "na3d_av"):
        assert name in functional.__all__


# Bad input --------------------------------------------------------------------------------------------------------------

QUERY = torch.randn(2, 4, 6, 8, 16)
ATTN = torch.randn(2, 4, 6, 8, 9)
WRONG_QK = {
    "query rank": (
        {"query": QUERY[0]},
        r"query.ndim = 4; wanted 5: \[batch, heads, x, x, head_dim",
    ),
    "key rank": ({"key": QUERY[0]}, r"key.ndim = 4; wanted 5"),
    "grid": ({"key": QUERY[:, :, :5]}, r"key.shape\[2:-1\] = \(5, 8\); wanted \(6, 8\)"),
    "batch": ({"key": QUERY[:1]}, r"key.shape\[0\] = 1; wanted 2"),
    "head dim": ({"key": QUERY[..., :8]}, r"key.shape\[-1\] = 8; wanted 16"),
    "no head dim": ({"query": QUERY[..., :0], "key": QUERY[..., :0]}, r"key.shape\[-1\] = 0"),
    "heads": ({"key": QUERY[:, :3]}, r"key.shape\[1\] = 3; wanted a divisor of 4"),
    "no heads": ({"query": QUERY[:, :0]}, r"query.shape\[1\] = 0; wanted at least 1 head"),
    "dtype": ({"key": QUERY.double()}, r"key.dtype = torch.float64; wanted torch.float32"),
    "integers": ({"query": QUERY.int(), "key": QUERY.int()}, r"query.dtype = torch.int32"),
    "device": ({"key": QUERY.to("meta")}, r"key.device = meta; wanted cpu"),
    "not a tensor": ({"query": [1]}, r"query = list; wanted a torch.Tensor"),
    "additional rank": ({"additional_keys": QUERY}, r"additional_keys.ndim = 5; wanted 4"),
    "additional heads": (
        {"additional_keys": QUERY[:, :2, 0]},
        r"additional_keys.shape\[1\] = 2; wanted 4, the key's number of heads",
    ),
    "additional dim": (
        {"additional_keys": QUERY[:, :, 0, :, :8]},
        r"additional_keys.shape\[-1\] = 8; wanted 16, the key's head dim",
    ),
    "additional batch": ({"additional_keys": QUERY[:1, :, 0]}, r"additional_keys.shape\[0\] = 1"),
    "rpb": ({"rpb": torch.randn(4, 5, 3)}, r"rpb.shape = \(4, 5, 3\); wanted \(4, 5, 5\)"),
    "rpb type": ({"rpb": torch.ones(4, 5, 5).int()}, r"rpb.dtype = torch.int32"),
    "rpb device": ({"rpb": torch.ones(4, 5, 5, device="meta")}, r"rpb.device = meta"),
    "kernel": ({"kernel_size": (3, 9)}, r"kernel_size\[1\] \* dilation\[1\] = 9 \* 1; wanted"),
    "kernels": ({"kernel_size": (3, 3, 3)}, r"kernel_size = \(3, 3, 3\); wanted one value, or 2"),
    "dilation": ({"dilation": 0}, r"dilation\[0\] = 0; wanted at least 1"),
    "stride": ({"stride": 4}, r"stride\[0\] = 4; wanted 1 to 3"),
    "causal": ({"is_causal": 1}, r"is_causal\[0\] = 1; wanted True or False"),
    "boundary": ({"boundary": "wrap"}, r"boundary\[0\] = 'wrap'; wanted one of 'shift'"),
    "offset": ({"offset": 1}, r"offset\[0\] = 1; wanted 0 to 0"),
}
WRONG_AV = {
    "attn rank": ({"attn": ATTN[0]}, r"attn.ndim = 4; wanted 5: .*prod\(kernel_size\)"),
    "value rank": ({"value": QUERY[0]}, r"value.ndim = 4; wanted 5"),
    "slots": ({"attn": ATTN[..., :8]}, r"attn.shape\[-1\] = 8; wanted 9, which is prod"),
    "additional": (
        {"additional_values": QUERY[:, :, 0, :2]},
        r"attn.shape\[-1\] = 9; wanted 11, .* \+ 2 additional",
    ),
    "grid": ({"attn": ATTN[:, :, :5]}, r"attn.shape\[2:-1\] = \(5, 8\); wanted \(6, 8\)"),
    "valid grid": ({"boundary": "valid"}, r"attn.shape\[2:-1\] = \(6, 8\); wanted \(4, 6\)"),
    "dtype": ({"value": QUERY.double()}, r"value.dtype = torch.float64; wanted .* as the attn"),
    "heads": ({"value": QUERY[:, :3]}, r"value.shape\[1\] = 3; wanted a divisor of 4, the attn's"),
    "empty": ({"value": QUERY[..., :0]}, r"value.shape\[-1\] = 0"),
}


@pytest.mark.parametrize("case", WRONG_QK)
def test_wrong_qk(case):
    changes, match = WRONG_QK[case]
    with pytest.raises(ValueError, match=match):
        na2d_qk(**{"query": QUERY, "key": QUERY, "kernel_size": 3, **changes})


@pytest.mark.parametrize("case", WRONG_AV)
def test_wrong_av(case):
    changes, match = WRONG_AV[case]
    with pytest.raises(ValueError, match=match):
        na2d_av(**{"attn": ATTN, "value": QUERY, "kernel_size": 3, **changes})
    with pytest.raises(RuntimeError, match=match):  # what the oldest callers catch
        na2d_av(**{"attn": ATTN, "value": QUERY, "kernel_size": 3, **changes})
