# SPDX-License-Identifier: MIT
"""Forward mode, second derivatives and compiled transforms of all ops, from the kernels, beside plain torch in float64."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import natten
from natten import _custom_op, _tangents, reference
from natten._problem import Operands, normalize
from natten.functional import na1d_qk, na2d_av, na2d_qk
from tests import oracle
from tests.cases import random_problem
from tests.test_kernels import call
from tests.test_torch import plain, scalar
from tests.test_unfused_torch import brute_force, of_ops

# torch's own code under compile and export warns of things that are not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

FEATURES = [
    ("rank1", "causal", "dilation", "rpb"),
    ("rank2", "rpb", "additional", "gqa", "value_dim", "zeros"),
    ("rank2", "boxes", "stride", "mask"),
    ("rank3", "valid", "additional"),
]


def small(features, seed):
    problem = random_problem(features, seed)
    return replace(problem, head_dim=8, scale=0.4, magnitude=1.0, batch=2)


def forbid(monkeypatch, *names):
    """Lets the test fail where the reference computes."""

    def refuse(*_, **__):
        message = "the reference ran"
        raise AssertionError(message)

    for name in names:
        monkeypatch.setattr(reference, name, refuse)


def random_like(tensors):
    return [None if t is None else torch.randn_like(t) for t in tensors]


def derivatives(function, operands, tangents, second, cotangents):
    """Tangents of results, and of gradients; what `second` pulls back to through the gradients."""
    present = [i for i, t in enumerate(operands) if t is not None]

    def of_present(*tensors):
        full = list(operands)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        return function(*full)

    def gradients(*tensors):
        _, pullback = torch.func.vjp(of_present, *tensors)
        return pullback(cotangents)

    primals = tuple(operands[i] for i in present)
    along = tuple(tangents[i] for i in present)
    _, first = jvp(of_present, primals, along)
    _, changes = jvp(gradients, primals, along)
    _, pullback = torch.func.vjp(gradients, *primals)
    return [*first, *changes, *pullback(tuple(second[i] for i in present))]


def as_plain(problem, operands):
    settings = {"grid": None, "query_origin": None, "key_origin": None, **problem.arguments()}
    normalized = normalize(Operands(*operands).describe(), None, **settings)

    def function(query, *others):
        for dim, start, length in normalized.narrowing:
            query = query.narrow(dim, start, length)
        return reference.forward(Operands(query, *others), normalized.flat_axes, normalized.scale)

    return function


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
@pytest.mark.parametrize("slabs", [False, True], ids=["whole", "slabs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_directional_derivatives_from_kernels(features, slabs, dtype, monkeypatch):
    """Of output, LSE and gradients, along all operands at once; also where weights of the grid are too many."""
    problem = small(features, 31)
    operands = problem.operands(dtype)
    tangents, second = random_like(operands), random_like(operands)
    cotangents = random_like(call(problem, operands))

    def double(tensors):
        return [None if t is None else t.double() for t in tensors]

    given = [double(tensors) for tensors in (operands, tangents, second)]
    right = derivatives(as_plain(problem, given[0]), *given, tuple(double(cotangents)))
    if slabs:
        monkeypatch.setattr(_tangents, "_LARGEST_WEIGHTS", 1)
    forbid(monkeypatch, "forward", "backward")

    def function(*tensors):
        return call(problem, tensors)

    results = derivatives(function, operands, tangents, second, tuple(cotangents))
    precision = 2e-5 if dtype == torch.float32 else 3e-2
    for result, expected in zip(results, right, strict=True):
        largest = max(1.0, expected.abs().max().item())
        oracle.assert_close(result.double(), expected, precision * largest)


@pytest.mark.parametrize("which", range(6))
def test_tangents_of_one_operand(which):
    problem = small(FEATURES[1], 32)
    operands = problem.operands(torch.float64)
    tangent = torch.randn_like(operands[which])

    def along(function):
        def of_one(tensor):
            return function(*operands[:which], tensor, *operands[which + 1 :])

        return jvp(of_one, (operands[which],), (tangent,))

    results = along(lambda *tensors: call(problem, tensors, "naive"))
    for result, right in zip(results[1], along(as_plain(problem, operands))[1], strict=True):
        oracle.assert_close(result, right, 1e-10)


@pytest.mark.parametrize("function", [scalar("auto"), of_ops("auto")], ids=["fused", "unfused"])
def test_gradients_change_with_their_cotangents(function):
    """Of operands that have no tangent; in a level that Python does not know of, as those of compiled graphs are."""
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    output = function(x, torch.randn(2, 5, dtype=torch.float64))
    (right,) = torch.autograd.grad(output, x, retain_graph=True)
    level = torch._C._enter_dual_level()
    try:
        cotangent = forward_ad.make_dual(torch.ones_like(output), output.detach(), level=level)
        (gradient,) = torch.autograd.grad(output, x, cotangent)
        tangent = forward_ad.unpack_dual(gradient, level=level).tangent
    finally:
        torch._C._exit_dual_level(level=level)
    oracle.assert_close(tangent, right * output.detach(), 1e-10 * right.abs().max().item())


@pytest.mark.parametrize(
    "function",
    [lambda x: natten.na1d(x, x * 0.5, x.sin(), 3), lambda x: na1d_qk(x, x.sin(), 3)],
    ids=["fused", "unfused"],
)
def test_gradients_change_with_operands_alone(function):
    """By cotangents that have no tangent, and without a record of the gradients' own computation."""
    x = torch.randn(1, 6, 6, 3, dtype=torch.float64)
    _, right = jvp(grad(lambda x: function(x).sum()), (x,), (x.cos(),))
    x.requires_grad_()
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(x, x.detach().cos()))
        (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
        tangent = forward_ad.unpack_dual(gradient).tangent
    oracle.assert_close(tangent, right, 1e-10 * right.abs().max().item())


def test_derivatives_where_nothing_is_attended_to():
    """Queries without a key: 0, and no NaN."""
    query = torch.randn(1, 4, 1, 4, dtype=torch.float64)
    key = torch.randn(1, 0, 1, 4, dtype=torch.float64)
    _, (output, lse) = jvp(
        lambda q: natten.attention(q, key, key, return_lse=True), (query,), (query,)
    )
    assert (output == 0).all()
    assert (lse == 0).all()


def test_autocast_does_not_reach_into_derivatives():
    x, tangent = torch.randn(2, 1, 9, 2, 8).unbind()
    more = torch.randn(1, 3, 2, 8)

    def function(x):
        return natten.na1d(x, x, x.sin(), 3, additional_keys=more, additional_values=more)

    def double_gradient(x):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).sin().sum(), leaf, create_graph=True)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
            return torch.autograd.grad(first.sin().sum(), leaf)[0]

    del tangent
    result = double_gradient(x)
    more = more.double()
    oracle.assert_close(result.double(), double_gradient(x.double()), 1e-4)


def test_inputs_are_let_go():
    """What is saved for forward mode does not outlive the derivatives."""
    x = torch.randn(1, 8, 1, 4, requires_grad=True)
    inside = x * 2
    output = natten.na1d(inside, inside, inside, 3)
    ref = weakref.ref(inside)
    del inside
    output.sum().backward()
    assert ref() is None


def test_private_api_of_torch_is_listed():
    used = set()
    for file in Path(natten.__file__).parent.glob("*.py"):
        text = re.sub(r"from (torch[.\w]*) import (\w+)", r"\1.\2", file.read_text())
        names = re.findall(r"\b(?:torch|forward_ad)(?:\.\w+)+", text)
        used |= {name.rpartition(".")[2] for name in names if re.search(r"\._(?!_)", name)}
    assert used == set(re.findall(r"`([a-z_A-Z]+)`", _custom_op.__doc__))


# Compiled: a graph never asks Python whether there is a tangent --------------------------------------------------------


def dual_levels(function):
    def tangent(x, rpb):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            return forward_ad.unpack_dual(function(dual, rpb)).tangent

    return tangent


COMPILED = {
    "jvp": lambda f: lambda x, rpb: jvp(f, (x, rpb), (x.cos(), rpb.cos())),
    "jvp_of_grad": lambda f: lambda x, rpb: jvp(lambda x: grad(f)(x, rpb), (x,), (x.cos(),)),
    "vmap_of_jvp": lambda f: (
        lambda x, rpb: vmap(lambda t: jvp(lambda rpb: f(x, rpb), (rpb,), (t,))[1])(
            torch.stack([rpb.cos(), rpb])
        )
    ),
    "grad_of_grad": lambda f: grad(lambda x, rpb: grad(f)(x, rpb).sin().sum(), (0, 1)),
    "dual_levels": dual_levels,
}
FUNCTIONS = {"fused": (scalar("auto"), plain), "unfused": (of_ops("auto"), None)}


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_compiled_transform(kind, transform, counter):
    """After an eager call of the same shape, and whole."""
    function, right = FUNCTIONS[kind]
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    rpb = torch.randn(2, 5, dtype=torch.float64)
    transformed = COMPILED[transform](function)
    expected = COMPILED[transform](right or brute_force())(x, rpb)
    transformed(x, rpb)
    compiled = torch.compile(transformed, fullgraph=True, backend=counter)
    flat = torch.utils._pytree.tree_leaves
    for result, value in zip(flat(compiled(x, rpb)), flat(expected), strict=True):
        oracle.assert_close(result, value, 1e-10 * max(1.0, value.abs().max().item()))


def test_compiled_tangents_of_every_size_at_once(counter):
    def function(x):
        return jvp(lambda x: natten.na1d(x, x.sin(), x, 3, return_lse=True), (x,), (x.cos(),))[1]

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch, extent in ((2, 5), (3, 6), (4, 9)):
        x = torch.randn(batch, extent, 3, 4)
        assert_same(compiled(x), function(x))
    assert counter.frame_count == 1


def test_tangents_through_a_module_with_dropout(counter):
    """Attention with dropped weights is unfused."""
    module = natten.NeighborhoodAttention1D(16, 2, 3, attn_drop=0.5).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)

    def function(x):
        return jvp(module.train(), (x,), (x.cos(),))

    torch.manual_seed(1)
    expected = function(x)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    torch.manual_seed(1)
    for result, right in zip(compiled(x), expected, strict=True):
        oracle.assert_close(result, right, 1e-10)


def test_the_reference_can_be_traced():
    """Before and after eager calls of the same shape, which fill its tables, and the other way round."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x):
        axes = normalize(
            Operands(x, x, x).describe(), 1, 3, 1, 1, True, "zeros", 0, None, None, None, None
        ).flat_axes
        operands = Operands(x, x, x)
        output, lse = reference.forward(operands, axes, 0.5)
        return reference.backward(operands, output, lse, axes, 0.5)[0] + output

    for extent in (4, 5):
        x, other = torch.randn(2, 1, extent, 2, 4).unbind()
        if extent == 5:
            function(x)
        with FakeTensorMode() as mode:
            assert function(mode.from_tensor(x)).shape == x.shape
        if extent == 5:
            traced = make_fx(function, tracing_mode="fake")(x)
            oracle.assert_close(traced(other), function(other), 1e-6)


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def test_export_of_tangents():
    """torch exports no grad of grad, not even of its own operations."""

    def function(x):
        return jvp(lambda x: natten.na1d(x, x.sin(), x, 3).sin(), (x,), (x.cos(),))[1]

    x = torch.randn(1, 8, 2, 4)
    right = function(x)
    program = torch.export.export(Wrapped(function), (x,))
    oracle.assert_close(program.module()(x), right, 1e-5)


def test_vmap_over_nothing():
    x = torch.randn(0, 1, 6, 2, 4)
    output, gradient = vmap(
        lambda x: (natten.na1d(x, x, x, 3), grad(lambda x: natten.na1d(x, x, x, 3).sum())(x))
    )(x)
    assert output.shape == gradient.shape == x.shape
    assert vmap(lambda x: na1d_qk(x, x, 3))(x.mT).shape == (0, 1, 6, 4, 3)


# Graphs that leave torch, or Python --------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Both halves of the unfused kind, and the fused kind with additional tokens or without."""

    def forward(self, tokens, heads_first, rpb, more=None):
        output = natten.na2d(
            tokens, tokens, tokens, 3, additional_keys=more, additional_values=more
        )
        logits = na2d_qk(heads_first, heads_first, 3, is_causal=True, rpb=rpb)
        return output, na2d_av(logits.softmax(-1), heads_first, 3, is_causal=True)


def of_size(batch, height):
    tokens = torch.randn(batch, height, 5, 2, 8)
    return tokens, torch.randn(batch, 2, height, 5, 8), torch.randn(2, 5, 5)


def assert_same(results, expected):
    for result, right in zip(results, expected, strict=True):
        oracle.assert_close(result, right, 1e-5)


def test_aot_inductor(tmp_path):
    """For any batch and height."""
    batch, height = (
        torch.export.Dim("batch", min=1, max=64),
        torch.export.Dim("height", min=3, max=64),
    )
    shapes = {"tokens": {0: batch, 1: height}, "heads_first": {0: batch, 2: height}, "rpb": None}
    program = torch.export.export(Model(), of_size(2, 4), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=f"{tmp_path}/model.pt2",
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # it runs once
    )
    inputs = of_size(3, 6)
    assert_same(torch._inductor.aoti_load_package(path)(*inputs), Model()(*inputs))


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning")
def test_a_trace_of_another_grid():
    traced = torch.jit.trace(Model(), of_size(2, 4))
    inputs = of_size(3, 4)
    assert_same(traced(*inputs), Model()(*inputs))
    with pytest.raises(
        RuntimeError, match=r"wanted \(batch, 4, 5, .* torch.jit.trace .* torch.export"
    ):
        traced(*of_size(2, 6))


def test_onnx(monkeypatch):
    """What torch.onnx.export makes an ONNX graph of: torch's own operations, for any batch; and what it does not."""
    model, inputs = Model(), (*of_size(2, 4), torch.randn(2, 1, 2, 8))
    whole = torch.export.export(model, inputs)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    batch, height = torch.export.Dim("batch", max=64), torch.export.Dim("height", min=3, max=64)
    shapes = {"tokens": {0: batch}, "heads_first": {0: batch}, "rpb": None, "more": {0: batch}}
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "natten" in str(node.target)]
    inputs = (*of_size(3, 4), torch.randn(3, 1, 2, 8))
    assert_same(program.module()(*inputs), model(*inputs))
    shapes["tokens"], shapes["heads_first"] = {1: height}, {2: height}
    with pytest.raises(NotImplementedError, match="for one grid and any batch"):
        torch.export.export(model, inputs, dynamic_shapes={**shapes, "more": None})
    with pytest.raises(NotImplementedError, match="the module, no graph of it"):
        whole.run_decompositions()
    with pytest.raises(NotImplementedError, match="dynamo=True"):
        torch.jit.trace(model, of_size(2, 4))
