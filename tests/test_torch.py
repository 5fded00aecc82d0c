# SPDX-License-Identifier: MIT
"""The ops as torch sees them: opcheck, compile, export, vmap, derivatives of any order, autocast, FLOPs, threads, fork."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import _C, reference
from natten._problem import Operands, normalize
from tests import oracle
from tests.cases import random_problem
from tests.test_kernels import call

# torch's own code under compile, export and vmap warns of things that are not ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)

FULL = random_problem(("rank2", "rpb", "additional", "gqa", "value_dim", "zeros"), 1)
FULL = replace(
    FULL, head_dim=8, head_dim_value=5, scale=None, magnitude=1.0, strided=False, batch=2
)


def as_op(problem, operands):
    """Arguments of the ops."""
    settings = {"grid": None, "query_origin": None, "key_origin": None, **problem.arguments()}
    normalized = normalize(Operands(*operands).describe(), None, **settings)
    return (*operands, list(normalized.flat_axes), normalized.scale)


def leaves(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


# Ops ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "naive", "reference"])
@pytest.mark.parametrize(
    "features", [("rank1",), ("rank3", "boxes"), ("rank2", "rpb", "additional")], ids="-".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, features, dtype):
    problem = replace(random_problem((*features, "causal"), 2), head_dim=8, head_dim_value=8)
    arguments = (*as_op(problem, problem.operands(dtype)), backend)
    operands = leaves(arguments[:6])
    # Gradients of a sum overflow nothing; opcheck compares eager with traced in fp32 tolerances.
    torch.library.opcheck(torch.ops.natten.forward.default, (*operands, *arguments[6:]))
    output, lse = torch.ops.natten.forward(*arguments)
    cotangents = torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(
        torch.ops.natten.backward.default,
        (*arguments[:6], output, lse, *cotangents, *arguments[6:]),
    )


def test_double_backward_of_the_op_is_registered():
    problem = replace(FULL, batch=1)
    arguments = (*as_op(problem, problem.operands(torch.float64)), "naive")
    output, lse = torch.ops.natten.forward(*arguments)
    operands = leaves(arguments[:6])
    gradients = torch.ops.natten.backward(
        *operands, output, lse, torch.randn_like(output), None, *arguments[6:]
    )
    assert all(gradient.requires_grad for gradient in gradients)


# Derivatives ----------------------------------------------------------------------------------------------------------


def scalar(backend):
    def function(x, rpb):
        output, lse = natten.na1d(x, x * 0.5, x.sin(), 3, backend=backend, rpb=rpb, return_lse=True)
        return output.sin().sum() + (lse**2).sum()

    return function


def plain(x, rpb):
    """The same, as plain torch operations."""
    operands = Operands(x, x * 0.5, x.sin(), None, None, rpb)
    problem = normalize(operands.describe(), 1, 3, 1, 1, False, "shift", 0, None, None, None, None)
    output, lse = reference.forward(operands, problem.flat_axes, problem.scale)
    return output.sin().sum() + (lse**2).sum()


def forward_mode(function):
    def tangent(x, rpb):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(function(dual, rpb)).tangent

    return tangent


def forward_over_reverse(function):
    def tangent(x, rpb):
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, torch.ones_like(x))
            (gradient,) = torch.autograd.grad(function(dual, rpb), leaf)
            return forward_ad.unpack_dual(gradient).tangent

    return tangent


TRANSFORMS = {
    "grad": lambda f: grad(f, (0, 1)),
    "vmap": lambda f: lambda x, rpb: vmap(f, (0, None))(x[:, None], rpb),
    "vmap_last_dim": lambda f: lambda x, rpb: vmap(f, (-1, None))(torch.stack([x, 2 * x], -1), rpb),
    "vmap_grad": lambda f: lambda x, rpb: vmap(grad(f, (0, 1)), (0, None))(x[:, None], rpb),
    "vmap_grad_rpb": lambda f: (
        lambda x, rpb: vmap(grad(f, (0, 1)))(x[:, None], torch.stack([rpb, -rpb]))
    ),
    "vmap_rpb_only": lambda f: (
        lambda x, rpb: vmap(grad(f, 1), (None, 0))(x, torch.stack([rpb, -rpb]))
    ),
    "vmap_vmap": lambda f: (
        lambda x, rpb: vmap(vmap(f, (0, None)), (0, None))(torch.stack([x, -x])[:, :, None], rpb)
    ),
    "grad_vmap": lambda f: grad(lambda x, rpb: vmap(f, (0, None))(x[:, None], rpb).sum(), (0, 1)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "jvp": lambda f: lambda x, rpb: jvp(f, (x, rpb), (x.cos(), rpb.cos())),
    "hessian": lambda f: lambda x, rpb: hessian(f)(x[:1, :4], rpb),
    "jacrev_jacrev": lambda f: lambda x, rpb: jacrev(jacrev(f))(x[:1, :4], rpb),
    "jvp_grad": lambda f: lambda x, rpb: jvp(lambda x: grad(f)(x, rpb), (x,), (x.cos(),)),
    "jvp_jvp": lambda f: (
        lambda x, rpb: jvp(lambda x: jvp(lambda x: f(x, rpb), (x,), (x.cos(),)), (x,), (x.sin(),))
    ),
    "jacfwd_jacfwd": lambda f: lambda x, rpb: jacfwd(jacfwd(f))(x[:1, :4], rpb),
    "jacrev_jacfwd": lambda f: lambda x, rpb: jacrev(jacfwd(f))(x[:1, :4], rpb),
    "grad_grad": lambda f: grad(lambda x, rpb: grad(f)(x, rpb).sin().sum(), (0, 1)),
    "grad_grad_grad": lambda f: grad(
        lambda x, r: grad(lambda x, r: grad(f)(x, r).sin().sum())(x, r).sin().sum(), (0, 1)
    ),
    "forward_mode": forward_mode,
    "forward_over_reverse": forward_over_reverse,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["naive", "reference"])
def test_transform(transform, backend):
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    rpb = torch.randn(2, 5, dtype=torch.float64)
    results = TRANSFORMS[transform](scalar(backend))(x, rpb)
    expected = TRANSFORMS[transform](plain)(x, rpb)
    flat = torch.utils._pytree.tree_leaves
    for result, right in zip(flat(results), flat(expected), strict=True):
        oracle.assert_close(result, right, 1e-10 * max(1.0, right.abs().max().item()), transform)


@pytest.mark.parametrize(
    "features",
    [("rpb", "zeros"), ("additional", "gqa"), ("boxes", "causal"), ("valid", "stride")],
    ids="-".join,
)
def test_gradcheck(features):
    problem = random_problem(("rank2", *features), 21)
    problem = replace(
        problem,
        head_dim=2,
        head_dim_value=1,
        magnitude=1.0,
        scale=0.7,
        batch=1,
        heads=problem.heads // problem.heads_kv,
        heads_kv=1,
    )
    operands = leaves(problem.operands(torch.float64))
    present = [t for t in operands if t is not None]

    def function(*tensors):
        given = iter(tensors)
        return call(problem, [None if t is None else next(given) for t in operands], "naive")

    fast = {"fast_mode": True, "atol": 1e-4}
    assert torch.autograd.gradcheck(function, present, **fast)
    assert torch.autograd.gradgradcheck(function, present, **fast)


@pytest.mark.parametrize("backend", ["naive", "fna"])
def test_second_derivatives_through_float32(backend):
    operands = leaves(FULL.operands(torch.float32))
    doubles = leaves([None if t is None else t.double() for t in operands])
    results = []
    for tensors, name in ((operands, backend), (doubles, "reference")):
        output, lse = call(FULL, tensors, name)
        gradients = torch.autograd.grad(output.sin().sum() + lse.sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in gradients), tensors))
    for result, right in zip(*results, strict=True):
        oracle.assert_close(result, right, 1e-4 * right.abs().max().item())


def test_only_some_inputs_need_gradients():
    operands = FULL.operands(torch.float32)
    everything = leaves(operands)
    full = torch.autograd.grad(call(FULL, everything)[0].sum(), everything)
    for i in range(6):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(operands)]
        (alone,) = torch.autograd.grad(call(FULL, some)[0].sum(), some[i])
        assert torch.equal(alone, full[i])


def test_gradient_through_lse_only_and_output_only():
    operands = leaves(FULL.operands(torch.float64))
    present = operands
    output, lse = call(FULL, operands, "naive")
    both = torch.autograd.grad(2 * output.sum() + lse.sum(), present, retain_graph=True)
    first = torch.autograd.grad(output.sum(), present, retain_graph=True)
    second = torch.autograd.grad(lse.sum(), present)
    for together, a, b in zip(both, first, second, strict=True):
        oracle.assert_close(2 * a + b, together, 1e-12)


def test_cotangents_of_any_layout():
    operands = leaves(FULL.operands(torch.float32))
    output, _ = call(FULL, operands)
    dense = torch.randn_like(output)
    layouts = [
        dense,
        dense.mT.contiguous().mT,  # last dim not contiguous
        torch.stack([dense, dense], -1)[..., 0],
        torch.nn.functional.pad(dense, (1, 1))[..., 1:-1],
    ]
    expected = torch.autograd.grad(output, operands, dense, retain_graph=True)
    for layout in layouts[1:]:
        for gradient, right in zip(
            torch.autograd.grad(output, operands, layout, retain_graph=True), expected, strict=True
        ):
            assert torch.equal(gradient, right)
    ones = torch.autograd.grad(output, operands, torch.ones_like(output), retain_graph=True)
    expanded = torch.autograd.grad(output, operands, torch.ones(()).expand_as(output))
    for gradient, right in zip(expanded, ones, strict=True):
        assert torch.equal(gradient, right)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("tokens", [0, 6])
def test_empty(batch, tokens):
    query = torch.randn(batch, tokens, 2, 8, requires_grad=True)
    key, value = torch.randn(2, batch, 6, 2, 8, requires_grad=True).unbind()
    output, lse = natten.na1d(query, key, value, 3, grid=6, query_origin=0, return_lse=True)
    assert output.shape == query.shape
    assert lse.shape == query.shape[:-1]
    gradients = torch.autograd.grad(output.sum() + lse.sum(), (query, key, value))
    if batch == 0 or tokens == 0:
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("count", [0, 1])
def test_few_additional_keys(count):
    query, key, value = torch.randn(3, 1, 9, 2, 8).unbind()
    more = torch.randn(1, count, 2, 8, requires_grad=True)
    output = natten.na1d(query, key, value, 3, additional_keys=more, additional_values=more)
    if count == 0:
        assert torch.equal(output, natten.na1d(query, key, value, 3))
    else:
        (gradient,) = torch.autograd.grad(output.sum(), more)
        assert gradient.shape == more.shape


def test_no_copies_of_strided_inputs():
    """Packed qkv, heads-first views, expanded batches: read where they are."""
    qkv = torch.randn(2, 7, 8, 3, 4, 16)
    query, key, value = qkv.unbind(3)
    expected = natten.na2d(*(t.contiguous() for t in (query, key, value)), 3)
    heads_first = [t.movedim(3, 1).contiguous().movedim(1, 3) for t in (query, key, value)]
    transposed = key.mT.contiguous().mT
    copies = 0
    original = torch.Tensor.contiguous

    def counting(tensor, *arguments, **settings):
        nonlocal copies
        copies += not tensor.is_contiguous()
        return original(tensor, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", counting)
        assert torch.equal(natten.na2d(query, key, value, 3), expected)
        assert torch.equal(natten.na2d(*heads_first, 3), expected)
        one = key[:1].expand(2, -1, -1, -1, -1)
        natten.na2d(query, one, one, 3)
        assert copies == 0
        assert torch.equal(natten.na2d(query, transposed, value, 3), expected)
        assert copies == 1


# Compilation ----------------------------------------------------------------------------------------------------------


COMPILED = [
    ("rank1", "causal"),
    ("rank2", "rpb", "additional"),
    ("rank3", "gqa"),
    ("rank2", "boxes"),
    ("rank2", "valid"),
]


@pytest.mark.parametrize("features", COMPILED, ids="-".join)
def test_compile(features, counter):
    problem = random_problem(features, 3)
    operands = problem.operands(torch.float32)

    def function(*tensors):
        output, lse = call(problem, [t * 1.0 if t is not None else None for t in tensors])
        return output.sin(), lse

    expected = oracle.run(function, operands)
    results = oracle.run(torch.compile(function, fullgraph=True, backend=counter), operands)
    assert counter.frame_count == 1
    for name, result, right in zip(oracle.NAMES, results, expected, strict=True):
        if right is not None:
            oracle.assert_close(
                result, right, 1e-5 * max(1.0, right[right.isfinite()].abs().max().item()), name
            )


def test_compile_by_inductor():
    torch._dynamo.reset()
    x = torch.randn(2, 6, 6, 2, 8, requires_grad=True)

    def function(x):
        return natten.na2d(x * 2, x + 1, x.sin(), 3).cos().sum()

    (expected,) = torch.autograd.grad(function(x), x)
    (result,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(x), x)
    oracle.assert_close(result, expected, 1e-5)


def test_compile_for_every_batch_size_at_once(counter):
    compiled = torch.compile(
        lambda q, k, v: natten.na2d(q, k, v, (3, 5), is_causal=(True, False)).sin(),
        fullgraph=True,
        backend=counter,
    )
    for batch in (2, 3, 5, 8, 13):
        x = torch.randn(batch, 5, 7, 2, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(compiled(x, x, x).sum(), x)
        (expected,) = torch.autograd.grad(
            natten.na2d(x, x, x, (3, 5), is_causal=(True, False)).sin().sum(), x
        )
        oracle.assert_close(gradient, expected, 1e-5)
    assert counter.frame_count <= 2  # once for the first size, once for all others


def test_compile_for_every_grid_at_once(counter):
    compiled = torch.compile(lambda x: natten.na2d(x, x, x, 3), fullgraph=True, backend=counter)
    for height, width in ((5, 7), (6, 8), (9, 11), (4, 12)):
        x = torch.randn(1, height, width, 2, 8)
        oracle.assert_close(compiled(x), natten.na2d(x, x, x, 3), 1e-6)
    assert counter.frame_count <= 2


def test_compile_with_numbers_as_inputs(counter):
    compiled = torch.compile(
        lambda x, kernel_size, scale: natten.na1d(x, x, x, kernel_size, scale=scale),
        fullgraph=True,
        backend=counter,
    )
    x = torch.randn(1, 12, 2, 8)
    for kernel_size, scale in ((3, 0.5), (4, 0.25), (5, 1.5)):
        expected = natten.na1d(x, x, x, kernel_size, scale=scale)
        oracle.assert_close(compiled(x, kernel_size, scale), expected, 1e-6)


def test_compile_attention_and_merge(counter):
    def function(query, key, value):
        parts = [
            natten.attention(query, key[:, part], value[:, part], return_lse=True)
            for part in (slice(0, 4), slice(4, 9))
        ]
        return natten.merge_attentions([p[0] for p in parts], [p[1] for p in parts])[0]

    query, key, value = torch.randn(3, 1, 9, 2, 8).unbind()
    result = torch.compile(function, fullgraph=True, backend=counter)(query, key, value)
    oracle.assert_close(result, natten.attention(query, key, value), 1e-5)


def test_compile_a_module(counter):
    module = natten.NeighborhoodAttention2D(dim=32, num_heads=4, kernel_size=3, rel_pos_bias=True)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(2, 6, 6, 32)
    oracle.assert_close(compiled(x), module(x), 1e-5)
    compiled(x).sum().backward()
    assert module.rpb.grad is not None


def test_a_compiled_function_obeys_the_backend_in_force(counter, monkeypatch):
    used = []
    original = _C.forward
    monkeypatch.setattr(
        _C,
        "forward",
        lambda problem, kernel, *rest: (used.append(kernel), original(problem, kernel, *rest))[1],
    )
    compiled = torch.compile(lambda x: natten.na1d(x, x, x, 3), fullgraph=True, backend=counter)
    x = torch.randn(1, 8, 1, 4)
    compiled(x)
    with natten.use_backend("naive"):
        compiled(x)
    assert used[-1].startswith("naive")
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:Dynamo (detected a call to|does not know how):UserWarning")
def test_flex_breaks_the_graph(counter):
    x = torch.randn(1, 8, 1, 4)
    expected = natten.na1d(x, x, x, 3)

    def function(x):
        return natten.na1d(x * 1.0, x, x, 3, backend="flex") + 1

    oracle.assert_close(torch.compile(function, backend=counter)(x), expected + 1, 1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"NotImplementedError|backend"):
        torch.compile(function, fullgraph=True, backend=counter)(x)
    inside = torch.compile(lambda x: natten.na1d(x, x, x, 3), fullgraph=True, backend=counter)
    with natten.use_backend("flex"), pytest.raises(NotImplementedError, match="'flex'"):
        inside(x)


def test_errors_in_a_compiled_function(counter):
    x = torch.randn(1, 8, 1, 4)
    compiled = torch.compile(lambda x: natten.na1d(x, x, x, 9), backend=counter)
    with pytest.raises((ValueError, torch._dynamo.exc.TorchRuntimeError), match="kernel_size"):
        compiled(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = natten.NeighborhoodAttention2D(
                dim=16, num_heads=2, kernel_size=3, dilation=2
            )

        def forward(self, x):
            return self.attention(x)

    model = Model().eval()
    x = torch.randn(2, 7, 8, 16)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    oracle.assert_close(program.module()(x), model(x), 1e-6)
    assert any("natten.forward" in str(node.target) for node in program.graph.nodes)
    if dynamic:
        more = torch.randn(5, 7, 8, 16)
        oracle.assert_close(program.module()(more), model(more), 1e-6)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.empty(2, 5, 6, 4, 8, device="meta")
    output, lse = natten.na2d(x, x[..., :2, :], x[..., :2, :], 3, return_lse=True)
    assert output.shape == x.shape
    assert output.device.type == "meta"
    assert lse.dtype == torch.float32
    with FakeTensorMode():
        fake = torch.empty(2, 5, 6, 4, 8, requires_grad=True)
        output = natten.na2d(fake, fake, fake, 3)
        output.sum().backward()
        assert fake.grad.shape == fake.shape


# Autocast, checkpointing, FLOPs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    operands = FULL.operands(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        output, lse = call(FULL, leaves(operands))
        half_key = call(FULL, [operands[0], operands[1].to(dtype), *operands[2:]])[0]
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    expected = call(FULL, [t.to(dtype) for t in operands[:5]] + [operands[5]])[0]
    assert torch.equal(output, expected)
    assert torch.equal(half_key, expected)
    inputs = leaves(operands)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        output = call(FULL, inputs)[0]
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert gradient.dtype == tensor.dtype


def test_autocast_leaves_float64_alone():
    operands = FULL.operands(torch.float64)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert call(FULL, operands)[0].dtype == torch.float64


def test_autocast_of_attention_and_of_a_module():
    x = torch.randn(1, 8, 2, 16)
    module = natten.NeighborhoodAttention1D(32, 2, 3, rel_pos_bias=True)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert natten.attention(x, x, x).dtype == torch.bfloat16
        assert module(x.flatten(-2)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bias_table_of_another_type(dtype):
    """Old checkpoints hold it in half precision; its gradient comes back in that."""
    operands = list(FULL.operands(torch.float32))
    operands[5] = operands[5].to(dtype)
    inputs = leaves(operands)
    output = call(FULL, inputs)[0]
    (gradient,) = torch.autograd.grad(output.sum(), inputs[5])
    assert gradient.dtype == dtype
    expected = call(FULL, [*operands[:5], operands[5].float()])[0]
    assert torch.equal(output, expected)


def test_checkpoint():
    operands = leaves(FULL.operands(torch.float32))
    expected = torch.autograd.grad(call(FULL, operands)[0].sum(), operands)
    output = checkpoint(lambda *t: call(FULL, t)[0], *operands, use_reentrant=False)
    for gradient, right in zip(torch.autograd.grad(output.sum(), operands), expected, strict=True):
        assert torch.equal(gradient, right)


def test_flops():
    operands = leaves(FULL.operands(torch.float32))
    attends, _, _ = oracle.mask(FULL)
    pairs = int(attends.sum()) + len(attends) * FULL.additional
    rows = FULL.batch * FULL.heads
    with FlopCounterMode(display=False) as counter:
        output = call(FULL, operands)[0]
    assert counter.get_total_flops() == 2 * rows * pairs * (8 + 5)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * rows * pairs * (3 * 8 + 2 * 5)


# Threads and processes --------------------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_the_number_of_threads_is_obeyed(monkeypatch):
    asked = []
    original = _C.forward
    # It comes before arch, stream and workspace.
    monkeypatch.setattr(
        _C, "forward", lambda *arguments: (asked.append(arguments[-4]), original(*arguments))[1]
    )
    x = torch.randn(1, 8, 1, 4)
    for number in (1, 2):
        torch.set_num_threads(number)
        natten.na1d(x, x, x, 3)
    assert asked == [1, 2]


def test_many_threads_at_once():
    problem = random_problem(("rank2", "additional"), 4)
    operands = problem.operands(torch.float32)
    expected = oracle.run(lambda *t: call(problem, t), operands)
    failures = []

    def work():
        try:
            for _ in range(10):
                for result, right in zip(
                    oracle.run(lambda *t: call(problem, t), operands), expected, strict=True
                ):
                    assert result is None or torch.equal(result, right)
        except BaseException as error:  # noqa: BLE001  # a failure in a thread must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Loaded(torch.utils.data.Dataset):
    """Attention in a DataLoader worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.full((1, 64, 2, 16), float(index)).cumsum(1)
        return natten.na1d(x, x, x, 5)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers():
    torch.set_num_threads(2)
    expected = torch.stack(
        [Loaded()[i] for i in range(4)]
    )  # starts this process's threads before the fork
    loader = torch.utils.data.DataLoader(
        Loaded(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    (batch,) = list(loader)
    oracle.assert_close(batch, expected, 1e-6)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_with_several_threads():
    """A forked child whose parent used the OpenMP pool does not hang, even if it asks for threads."""
    import multiprocessing

    torch.set_num_threads(2)
    x = torch.randn(1, 512, 2, 16)
    expected = natten.na1d(x, x, x, 31)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child():
        # natten's own threads: torch's pool would hang in the child.
        queue.put(float((natten.na1d(x, x, x, 31) - expected).numpy().max()))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    hangs = process.is_alive()
    if hangs:
        process.kill()
    assert not hangs
    assert math.isclose(queue.get(timeout=10), 0.0)
