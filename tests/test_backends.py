# SPDX-License-Identifier: MIT
"""Which backend runs: what is named wins over what is in force, in threads, tasks, workers and graphs; and why one cannot."""

from __future__ import annotations

import asyncio
import threading
from multiprocessing.pool import ThreadPool

import pytest
import torch

import natten
from natten import _C, functional, info

pytestmark = pytest.mark.cpu  # choices among the CPU's kernels


def tensors(*shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


@pytest.fixture
def used(monkeypatch):
    """Names of the kernels that run."""
    names = []
    original = _C.forward

    def spy(problem, kernel, *rest):
        names.append(kernel)
        original(problem, kernel, *rest)

    monkeypatch.setattr(_C, "forward", spy)
    return names


X = torch.randn(1, 8, 1, 4)


def test_use_backend_nests_and_a_named_backend_wins(used):
    def backend():
        natten.na1d(X, X, X, 3)
        return used[-1].partition("_")[0]

    assert backend() == "fna"
    with natten.use_backend("naive"):
        assert backend() == "naive"
        with natten.use_backend("fna"):
            assert backend() == "fna"
            natten.na1d(X, X, X, 3, backend="naive")
            assert used[-1].startswith("naive")
        assert backend() == "naive"
        with pytest.raises(ZeroDivisionError), natten.use_backend("auto"):
            1 / (len(backend()) - len("fna"))
        assert backend() == "naive"
    assert backend() == "fna"


def test_use_backend_is_of_a_thread(used):
    def work():
        natten.na1d(X, X, X, 3)

    with natten.use_backend("naive"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert used[-1].startswith("fna")


def test_use_backend_is_not_inherited_by_a_pool():
    def backend(_):
        return natten.explain(X, X, X, 3).selected.backend

    with natten.use_backend("naive"), ThreadPool(2) as pool:
        assert set(pool.map(backend, range(4))) == {"fna"}
        with natten.use_backend("reference"):
            assert set(pool.map(natten.use_backend("naive")(backend), range(4))) == {"naive"}
            assert backend(0) == "reference"


def test_use_backend_in_a_generator():
    """It shares the context of its caller; around what lies between two values it is its own."""

    def backend():
        return natten.explain(X, X, X, 3).selected.backend

    def around_a_value():
        with natten.use_backend("naive"):
            yield backend()
        yield backend()

    def between_values():
        for _ in range(2):
            with natten.use_backend("naive"):
                value = backend()
            yield value

    generator = around_a_value()
    assert (next(generator), backend()) == ("naive", "naive")
    assert (next(generator), backend()) == ("fna", "fna")
    abandoned = around_a_value()
    next(abandoned)
    abandoned.close()
    assert backend() == "fna"
    generator = between_values()
    with natten.use_backend("reference"):
        assert (next(generator), backend()) == ("naive", "reference")
    assert (next(generator), backend()) == ("naive", "fna")


def test_use_backend_as_a_decorator():
    @natten.use_backend("naive")
    def recursive(depth):
        found = natten.explain(X, X, X, 3).selected.backend
        return [found] + (recursive(depth - 1) if depth else [])

    assert recursive(2) == ["naive"] * 3
    assert natten.explain(X, X, X, 3).selected.backend == "fna"

    async def coroutine():
        pass

    async def asynchronous():
        yield

    for function in (coroutine, asynchronous, lambda: (yield)):
        with pytest.raises(
            ValueError, match="a function that runs when it is called: write `with`"
        ):
            natten.use_backend("naive")(function)


def test_use_backend_by_itself_checks_the_name_and_warns():
    with pytest.raises(ValueError, match="backend = 'naiv'; wanted one of"):
        natten.use_backend("naiv")
    with pytest.warns(RuntimeWarning, match=r"use_backend\('naive'\) was never entered") as caught:
        natten.use_backend("naive")
    assert caught[0].filename == __file__
    assert natten.explain(X, X, X, 3).selected.backend == "fna"


class Backends(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return natten._dispatch.backend_in_force()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("context", "expected"), [("fork", "naive"), ("spawn", "auto")])
def test_use_backend_and_workers_of_a_loader(context, expected):
    """What is in force where iteration begins; the dataset's own choice is stronger in any case."""
    loader = torch.utils.data.DataLoader(
        Backends(), num_workers=1, batch_size=None, multiprocessing_context=context
    )
    with natten.use_backend("naive"):
        workers = iter(loader)
    assert list(workers) == [expected] * 2


def test_gradients_are_of_the_backend_of_the_forward_pass(used, monkeypatch):
    kernels = []
    original = _C.backward
    monkeypatch.setattr(
        _C,
        "backward",
        lambda problem, kernel, *rest: (kernels.append(kernel), original(problem, kernel, *rest))[
            1
        ],
    )
    x = X.clone().requires_grad_()
    with natten.use_backend("naive"):
        output = natten.na1d(x, x, x, 3)
    with natten.use_backend("fna"):
        output.sum().backward()
    assert [name.partition("_")[0] for name in (*used, *kernels)] == ["naive", "naive"]


@pytest.mark.filterwarnings("ignore:Dynamo (detected a call to|does not know how):UserWarning")
def test_use_backend_inside_what_is_compiled(used):
    def function(x):
        with natten.use_backend("naive"):
            output = natten.na1d(x, x, x, 3)
        return output + natten.na1d(x, x, x, 3)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    for _ in range(2):
        used.clear()
        compiled(X)
        assert [name.partition("_")[0] for name in used] == ["naive", "fna"]
    torch._dynamo.reset()


def test_use_backend_is_of_a_task():
    async def one(name, others):
        with natten.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                others.append((name, natten.explain(X, X, X, 3).selected.backend))

    async def both():
        seen = []
        await asyncio.gather(one("naive", seen), one("reference", seen))
        return seen

    assert all(wanted == got for wanted, got in asyncio.run(both()))


@pytest.mark.parametrize(
    "name",
    ["cutlass-fna", "hopper-fna", "blackwell-fna", "cutlass-fmha", "hopper-fmha", "blackwell-fmha"],
)
def test_names_of_the_older_package(name, used):
    natten.na1d(X, X, X, 3, backend=name)
    assert used[-1].startswith("fna")
    with natten.use_backend(name):
        assert natten.attention(X, X, X).shape == X.shape
    assert natten.explain(X, X, X, 3, backend="flex-fna").selected.backend == "flex"


def test_unknown_backend():
    with pytest.raises(ValueError, match="'cutlass-fna'"), natten.use_backend("cutlass"):
        pass


def test_a_backend_that_cannot_run_says_why():
    x = X.double()
    with pytest.raises(NotImplementedError) as raised:
        natten.na1d(x, x, x, 3, backend="fna")
    message = str(raised.value)
    for kernel in _C.kernels():
        if kernel.op == "forward" and kernel.backend == "fna":
            assert (
                f"{kernel.name}: computes {kernel.dtypes[0]}, and the problem is float64" in message
            )
    grad = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward on cpu"):
        natten.na1d(grad, grad, grad, 3, backend="flex")
    with torch.no_grad():
        assert natten.na1d(grad, grad, grad, 3, backend="flex").shape == X.shape


def test_explain_lists_everything_and_runs_nothing(used):
    explanation = natten.explain(X, X, X, kernel_size=3)
    assert not used
    forward = [kernel.name for kernel in _C.kernels() if kernel.op == "forward"]
    backends = dict.fromkeys(kernel.backend for kernel in _C.kernels())
    unfused = [name for name in backends if not any(row.startswith(name) for row in forward)]
    names = [*forward, *unfused, "flex", "reference"]
    assert [c.kernel for c in explanation.candidates] == names
    assert explanation.selected is next(c for c in explanation.candidates if not c.reasons)
    assert f"-> {explanation.selected.kernel}: can run" in str(explanation)
    natten.na1d(X, X, X, 3)
    assert used == [explanation.selected.kernel]


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_forced_isa(isa, used, monkeypatch):
    natten.na1d(X, X, X, 3)
    monkeypatch.setenv("NATTEN_CPU_ISA", isa)
    natten.na1d(X, X, X, 3)
    by_name = {kernel.name: kernel for kernel in _C.kernels()}
    assert by_name[used[0]].isa == _C.cpu_isas()[0]
    assert by_name[used[1]].isa == isa


def test_forced_isa_that_is_not_there(monkeypatch):
    """It stops what would run on the CPU's kernels, and nothing else; nothing slow stands in."""
    expected = natten.na1d(X, X, X, 3)
    monkeypatch.setenv("NATTEN_CPU_ISA", "avx1024")
    match = "NATTEN_CPU_ISA = 'avx1024' is not an instruction set that this CPU can run"
    for backend in (None, "fna", "naive", f"fna:{(*_C.cpu_isas(), 'auto')[0]}"):
        with pytest.raises(ValueError, match=match):
            natten.na1d(X, X, X, 3, backend=backend)
        explanation = natten.explain(X, X, X, 3, backend=backend)
        assert explanation.selected is None
        assert match in str(explanation)
    with pytest.raises(ValueError, match=match):
        functional.na1d_qk(X.movedim(-2, 1), X.movedim(-2, 1), 3)
    for backend in ("reference", "flex"):
        assert torch.allclose(natten.na1d(X, X, X, 3, backend=backend), expected, atol=1e-5)
        assert natten.explain(X, X, X, 3, backend=backend).selected.backend == backend
    meta = X.to("meta")
    assert natten.na1d(meta, meta, meta, 3).shape == X.shape
    assert natten.explain(X, X, X, 3, device="sm_80").candidates
    assert not natten.has_fna("cpu")
    assert match in info.report()


def test_on_a_device_without_kernels(monkeypatch):
    """What dispatch says of a GPU that torch was not built for (ROCm's are called cuda too)."""
    from dataclasses import replace

    from natten import _dispatch
    from natten._problem import Operands, normalize

    rpb = torch.zeros(1, 5)
    x = torch.randn(1, 8, 1, 32)
    arguments = (1, 3, 1, 1, False, "shift", 0, None, None, None, None)
    plain = normalize(Operands(x, x, x).describe(), *arguments)
    monkeypatch.setattr(_dispatch, "_HAS_CUDA", False)
    plain = replace(plain, device=torch.device("cuda"))
    found = _dispatch.candidates(plain, needs_grad=True, isa="")
    why = ("runs on the CPU or an NVIDIA GPU, and the tensors are on cuda",)
    compiled = {c.kernel for c in found if c.reasons == why}
    assert compiled == {kernel.name for kernel in _C.kernels() if kernel.op == "forward"}
    assert _dispatch.select(plain, True, "auto", "") == "flex"
    with pytest.raises(NotImplementedError, match="the tensors are on cuda"):
        _dispatch.select(plain, True, "fna", "")
    biased = normalize(Operands(x, x, x, None, None, rpb).describe(), *arguments)
    biased = replace(biased, device=torch.device("cuda"))
    _dispatch._warn_of_reference.cache_clear()
    with pytest.warns(UserWarning, match="no fast backend runs this problem on cuda"):
        assert _dispatch.select(biased, True, "auto", "") == "reference"
    assert _dispatch.select(biased, True, "auto", "") == "reference"  # said once


def test_ops_check_shapes_before_they_read():
    x = torch.randn(1, 8, 1, 4)
    axes = [8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8]
    torch.ops.natten.forward(x, x, x, None, None, None, axes, 1.0, "auto")
    longer = [9, 3, 1, 1, 0, 0, 0, 0, 9, 0, 9]
    with pytest.raises(ValueError, match=r"shape = .*; wanted"):
        torch.ops.natten.forward(x, x, x, None, None, None, longer, 1.0, "auto")
    with pytest.raises(ValueError, match=r"shape = .*; wanted"):
        torch.ops.natten.forward(x, x, x[:, :7], None, None, None, axes, 1.0, "auto")
    with pytest.raises(ValueError, match=r"value.dtype = torch.bfloat16; wanted torch\.float32"):
        torch.ops.natten.forward(x, x, x.bfloat16(), None, None, None, axes, 1.0, "auto")
    with pytest.raises(ValueError, match=r"d_output.shape = \(1, 7, 1, 4\); wanted \(1, 8, 1, 4\)"):
        torch.ops.natten.backward(
            x, x, x, None, None, None, x, x[..., 0], x[:, :7], None, axes, 1.0, "auto"
        )


def test_a_choice_is_of_its_kind_of_problem():
    """Choices are remembered; what they depend on makes another one."""
    small, large = (
        torch.randn(1, 8, 1, 16),
        torch.randn(1, 8, 1, 520),
    )  # more than the fused kernels take
    for x in (small, large):  # by "fna", and by "naive"
        assert natten.na1d(x, x, small, 3).shape == small.shape
    with pytest.raises(NotImplementedError, match="head dims up to"):
        natten.na1d(large, large, large, 3, backend="fna")
    natten.na1d(small, small, small, 3, backend="flex")
    leaf = small.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="flex"):
        natten.na1d(leaf, leaf, leaf, 3, backend="flex")
