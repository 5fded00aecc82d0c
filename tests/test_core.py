"""The compiled core by itself: naive kernels against a dense computation, threads, dispatch, the kernel table."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

from natten import _C

pytestmark = pytest.mark.cpu  # calls the core with addresses of the CPU

ROOT = Path(__file__).parents[1]
NOTHING = (0, 0, (0,), 0)
SUFFIXES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


def axis(
    extent: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    is_causal: bool = False,
    boundary: str = "shift",
    offset: int = 0,
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
) -> tuple[int, ...]:
    query_begin, query_end = queries or (0, extent)
    key_begin, key_end = keys or (0, extent)
    return (
        *(extent, kernel_size, stride, dilation, int(is_causal), _C.BOUNDARIES.index(boundary)),
        *(offset, query_begin, query_end - query_begin, key_begin, key_end - key_begin),
    )


@dataclass(frozen=True)
class Case:
    axes: tuple[tuple[int, ...], ...]
    batch: int = 1
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 9
    head_dim_value: int = 9
    additional_keys: int = 0
    has_rpb: bool = False
    scale: float = 0.4
    d_lse: bool = True
    query_extent: tuple[int, ...] = field(init=False)
    key_extent: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_extent", tuple(a[8] for a in self.axes))
        object.__setattr__(self, "key_extent", tuple(a[10] for a in self.axes))

    def problem(self, dtype: torch.dtype) -> _C.Problem:
        return _C.Problem(
            str(dtype).removeprefix("torch."),
            [i for a in self.axes for i in a],
            self.batch,
            self.heads,
            self.heads_kv,
            self.head_dim,
            self.head_dim_value,
            self.additional_keys,
            self.has_rpb,
            self.scale,
        )

    def inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Random inputs and gradients that arrive, heads interleaved so that nothing is contiguous."""
        torch.manual_seed(0)
        query, key = (self.batch, *self.query_extent), (self.batch, *self.key_extent)
        more = (self.batch, self.additional_keys)
        shapes = {
            "query": (*query, self.heads, self.head_dim),
            "key": (*key, self.heads_kv, self.head_dim),
            "value": (*key, self.heads_kv, self.head_dim_value),
            "additional_keys": (*more, self.heads_kv, self.head_dim),
            "additional_values": (*more, self.heads_kv, self.head_dim_value),
            "d_output": (*query, self.heads, self.head_dim_value),
        }
        tensors = {
            name: torch.randn(*shape[:-1], 2, shape[-1], dtype=torch.float64).to(dtype)[..., 1, :]
            for name, shape in shapes.items()
        }
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors["d_lse"] = torch.randn(*query, self.heads, dtype=wide)
        if not self.d_lse:
            tensors["d_lse"].zero_()
        tensors["rpb"] = torch.randn(self.heads, *self.rpb_extent, dtype=wide)
        return tensors

    @property
    def rpb_extent(self) -> tuple[int, ...]:
        return tuple(2 * a[1] - 1 for a in self.axes)


CASES = {
    "1d": Case((axis(11, 4),)),
    "2d-stride-causal": Case((axis(7, 3, stride=2), axis(6, 4, stride=3, is_causal=True))),
    "2d-dilation": Case((axis(11, 3, dilation=3), axis(7, 2, dilation=2)), batch=2, has_rpb=True),
    "3d": Case((axis(4, 2), axis(5, 3, is_causal=True), axis(6, 5)), has_rpb=True),
    "gqa-values-tokens": Case(
        (axis(5, 3), axis(6, 4)), heads=4, heads_kv=2, head_dim_value=5, additional_keys=3
    ),
    "zeros": Case((axis(6, 5, boundary="zeros"), axis(5, 4, boundary="zeros")), has_rpb=True),
    "zeros-mixed": Case(
        (axis(7, 3, boundary="zeros", dilation=2), axis(5, 4, boundary="mask")), additional_keys=1
    ),
    "halo": Case((axis(8, 6, stride=4, boundary="mask"), axis(6, 3, stride=3, offset=1))),
    "box": Case(
        (axis(9, 4, queries=(3, 6), keys=(1, 8)), axis(8, 3, dilation=2, queries=(5, 8))),
        has_rpb=True,
        additional_keys=2,
    ),
    "no-lse-gradient": Case((axis(11, 4),), d_lse=False),
    "nothing": Case((axis(11, 4),), batch=0, has_rpb=True, additional_keys=1),
    "no-queries": Case((axis(11, 4, queries=(3, 3)),), has_rpb=True, additional_keys=1),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def reference(tensor: torch.Tensor, *, head_dim: bool = True) -> tuple[int, ...]:
    """A tensor as the core wants it."""
    strides = tensor.stride()[:-1] if head_dim else tensor.stride()
    return (tensor.data_ptr(), strides[0], tuple(strides[1:-1]), strides[-1])


def run_naive(
    case: Case, dtype: torch.dtype, num_threads: int, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Output, LSE and all gradients of the naive kernels."""
    problem, t = case.problem(dtype), inputs
    query_shape = (case.batch, *case.query_extent, case.heads)
    output = torch.full((*query_shape, case.head_dim_value), math.nan, dtype=dtype)
    lse = torch.full(query_shape, math.nan, dtype=t["d_lse"].dtype)
    gradients = {
        f"d_{name}": torch.full_like(t[name], math.nan)
        for name in ("query", "key", "value", "additional_keys", "additional_values", "rpb")
    }
    g = gradients
    if case.additional_keys:
        additional = [reference(t["additional_keys"]), reference(t["additional_values"])]
        d_additional = [reference(g["d_additional_keys"]), reference(g["d_additional_values"])]
    else:
        additional = d_additional = [NOTHING, NOTHING]
    forward_inputs = [
        *(reference(t[name]) for name in ("query", "key", "value")),
        *additional,
        t["rpb"].data_ptr() if case.has_rpb else 0,
        reference(output),
        reference(lse, head_dim=False),
    ]
    suffix = SUFFIXES[dtype]
    _C.forward(problem, f"naive_forward_{suffix}", *forward_inputs, num_threads)
    _C.backward(
        problem,
        f"naive_backward_{suffix}",
        *forward_inputs,
        reference(t["d_output"]),
        reference(t["d_lse"], head_dim=False) if case.d_lse else NOTHING,
        *(reference(g[name]) for name in ("d_query", "d_key", "d_value")),
        *d_additional,
        g["d_rpb"].data_ptr() if case.has_rpb else 0,
        num_threads,
    )
    if not case.has_rpb:
        del g["d_rpb"]
    return {"output": output, "lse": lse, **g}


def dense_mask(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask [queries, keys], index into the flat bias table [queries, keys], missing keys [queries]."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    bias = torch.zeros(1, 1, dtype=torch.long)
    counted = torch.ones(1, dtype=torch.long)
    for a in case.axes:
        kernel_size, dilation, query_origin, key_origin = a[1], a[3], a[7], a[9]
        query = torch.arange(query_origin, query_origin + a[8])[:, None]
        key = torch.arange(key_origin, key_origin + a[10])[None, :]
        rows = torch.tensor(_C.windows(a), dtype=torch.long).reshape(-1, 4)
        position = key // dilation
        there = (key % dilation == query % dilation) & (position >= rows[:, 1:2])
        there &= position < rows[:, 2:3]
        entry = (position - query // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2)

        def outer(
            left: torch.Tensor, right: torch.Tensor, join: Callable[..., torch.Tensor]
        ) -> torch.Tensor:
            joined = join(left[:, None, :, None], right[None, :, None, :])
            return joined.flatten(0, 1).flatten(1, 2)

        mask = outer(mask, there, torch.logical_and)
        bias = outer(bias * (2 * kernel_size - 1), entry, torch.add)
        counted = (counted[:, None] * rows[None, :, 3]).flatten()
    return mask, bias, counted - mask.sum(1)


def run_dense(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in float64 with a dense mask and torch's own derivatives."""
    leaves = {
        name: tensor.double().clone().requires_grad_()
        for name, tensor in inputs.items()
        if not name.startswith("d_")
    }
    mask, bias, missing = dense_mask(case)
    group_size = case.heads // case.heads_kv
    query, key, value = (leaves[name].flatten(1, -3) for name in ("query", "key", "value"))
    key, value, more_keys, more_values = (
        tensor.repeat_interleave(group_size, dim=-2)
        for tensor in (key, value, leaves["additional_keys"], leaves["additional_values"])
    )
    logits = case.scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if case.has_rpb:
        logits = logits + leaves["rpb"].flatten(1)[:, bias]
    logits = logits.masked_fill(~mask, -math.inf)
    more_logits = case.scale * torch.einsum("bqhd,bkhd->bhqk", query, more_keys)
    zeros = missing.double().log()[:, None].expand(case.batch, case.heads, -1, 1)
    logits = torch.cat([logits, more_logits, zeros], dim=-1)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()[..., :-1]
    output = torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat([value, more_values], dim=1))
    output = output.reshape(case.batch, *case.query_extent, case.heads, case.head_dim_value)
    lse = lse.transpose(1, 2).reshape(case.batch, *case.query_extent, case.heads)
    loss = (output * inputs["d_output"]).sum() + (lse * inputs["d_lse"]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), "lse": lse.detach(), **named}


@CASE
@pytest.mark.parametrize("dtype", SUFFIXES)
def test_naive_kernels(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    expected = run_dense(case, inputs)
    # The 16-bit types round output and gradients of size up to 10 once, at 2^-9 and 2^-12 of them, and delta is
    # computed from the rounded output.
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 4e-2,
        torch.float16: 5e-3,
    }[dtype]
    for name, result in run_naive(case, dtype, 2, inputs).items():
        torch.testing.assert_close(
            result.double(),
            expected[name],
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@CASE
def test_naive_kernels_are_deterministic(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    one = run_naive(case, torch.float32, 1, inputs)
    for num_threads in (2, 5):
        for name, result in run_naive(case, torch.float32, num_threads, inputs).items():
            assert torch.equal(result, one[name]), f"{name} depends on the number of threads"


def test_naive_overflow_of_logits() -> None:
    case = CASES["1d"]
    inputs = case.inputs(torch.float32)
    inputs["query"] *= 1000
    expected = run_dense(case, inputs)
    results = run_naive(case, torch.float32, 1, inputs)
    torch.testing.assert_close(results["output"].double(), expected["output"], atol=1e-3, rtol=1e-3)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_naive_poison_stays_in_its_window(poison: float) -> None:
    case = Case((axis(9, 3), axis(9, 3)))
    inputs = case.inputs(torch.float32)
    clean = run_naive(case, torch.float32, 2, inputs)
    inputs["key"][0, 4, 4, 0, 2] = poison
    inputs["value"][0, 4, 4, 0, 2] = poison
    results = run_naive(case, torch.float32, 2, inputs)
    outside = torch.ones(9, 9, dtype=torch.bool)
    outside[3:6, 3:6] = False
    for name in ("output", "lse", "d_query"):
        assert torch.equal(results[name][0, outside], clean[name][0, outside])
        assert torch.equal(results[name][0, :, :, 1], clean[name][0, :, :, 1])
    # Keys two steps away share queries with the poisoned one.
    outside[2:7, 2:7] = False
    for name in ("d_key", "d_value"):
        assert torch.equal(results[name][0, outside], clean[name][0, outside])


def test_naive_row_without_weights() -> None:
    case = Case((axis(5, 3),), has_rpb=True)
    inputs = case.inputs(torch.float32)
    inputs["rpb"][1] = -math.inf
    results = run_naive(case, torch.float32, 1, inputs)
    assert (results["lse"][..., 1] == -math.inf).all()
    for name in ("output", "d_query", "d_key", "d_value"):
        assert (results[name][..., 1, :] == 0).all()
        assert results[name].isfinite().all()
    assert (results["d_rpb"][1] == 0).all()


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [-1, 0, 1, 2, 3, 7])
def test_num_threads(num_threads: int) -> None:
    assert _C.num_parallel_threads(num_threads) == max(num_threads, 1)


def run_python(script: str) -> str:
    """Output of a fresh interpreter; raises if it fails or hangs."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_regions_after_fork() -> None:
    script = """
import os, torch
from natten import _C
torch.ones(1 << 20).exp_()
assert _C.num_parallel_threads(2) == 2
child = os.fork()
if child == 0:
    _C.after_fork_in_child()
    os._exit(0 if all(_C.num_parallel_threads(n) == n for n in (1, 2, 4)) else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert _C.num_parallel_threads(2) == 2
"""
    run_python(script)


def test_tiny_problems_start_no_threads() -> None:
    """A region that others' threads have to join takes milliseconds on a busy machine, a tiny problem microseconds."""
    script = """
import os, torch, natten
from natten.functional import na2d_av, na2d_qk
torch.set_num_threads(4)

def threads():
    return len(os.listdir("/proc/self/task"))

def run(tokens, kernel_size, backend, dim=16):
    t = [torch.randn(1, tokens, tokens, 1, dim).requires_grad_() for _ in range(3)]
    natten.na2d(*t, kernel_size, backend=backend).backward(torch.ones_like(t[0]))
    query, key, value = (x.movedim(-2, 1) for x in t)
    backend = "gemm" if backend == "fna" else backend
    weights = na2d_qk(query, key, kernel_size, backend=backend)
    # Without softmax: torch takes all threads for its own.
    na2d_av(weights, value, kernel_size, backend=backend).sum().backward()

torch.ones(1, requires_grad=True).exp().backward()  # has a thread of its own
before = threads()
run(8, 5, "fna")
run(4, 3, "naive")
query, key, value = torch.randn(3, 1, 128, 4, 64).unbind()
natten.attention(query[:, :1], key, value)
assert threads() == before, (threads(), before)
run(64, 9, "fna", 64)
assert threads() >= before + 3, (threads(), before)
"""
    run_python(script)


def test_core_without_torch() -> None:
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("natten._C", {_C.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
assert core.num_parallel_threads(3) == 3
assert core.attended_pairs([8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8]) == 24
assert "torch" not in sys.modules
"""
    run_python(script)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_no_library_of_torch_is_linked() -> None:
    listing = subprocess.run(
        [tool("readelf"), "--dynamic", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in listing.splitlines() if "(NEEDED)" in line]
    assert needed
    for line in needed:
        assert not any(name in line for name in ("torch", "c10", "gomp", "omp.so")), line


@pytest.mark.parametrize(
    "flags",
    [("-fsanitize=thread",), ("-fopenmp", "-Wl,--no-as-needed"), ("-fsanitize=address,undefined",)],
    ids=["own threads, tsan", "openmp", "own threads, asan"],
)
def test_parallel_regions(tmp_path: Path, flags: tuple[str, ...]) -> None:
    binary = tmp_path / "parallel_test"
    sources = [
        ROOT / name
        for name in ("tests/parallel_test.cpp", "src/cpu/parallel.cpp", "src/cpu/scratch.cpp")
    ]
    includes = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}"]
    command = [tool("c++"), "-std=c++17", "-O1", "-pthread", *flags, *includes, *sources, "-ldl"]
    subprocess.run([*command, "-o", binary], check=True, timeout=300)
    # setarch: ThreadSanitizer cannot place its memory under the address randomisation of newer kernels.
    run = [tool("setarch"), "--addr-no-randomize", binary]
    # `make sanitize` preloads another sanitizer.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed\n"


@pytest.mark.parametrize("boxes", [4, 5])
def test_the_queue_of_lines_to_fetch_has_a_bound(tmp_path: Path, boxes: int) -> None:
    source = tmp_path / "fetch.cpp"
    given = ", ".join(["box"] * boxes)
    source.write_text(f"""
#define NATTEN_CPU_ISA test
#include "natten/cpu/fetch.hpp"
using namespace natten::cpu::test;
void start(FetchAhead& fetch, Fetched const& box) {{ fetch.start({given}); }}
""")
    command = [tool("c++"), "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'include'}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (boxes <= 4), done.stderr
    assert ("no room for so many boxes" in done.stderr) == (boxes > 4), done.stderr


# --- dispatch --------------------------------------------------------------------------------------------------------


def float_problem(dtype: str = "float32", head_dim: int = 64) -> _C.Problem:
    return _C.Problem(dtype, axis(64, 7), 1, 2, 2, head_dim, head_dim, 0, False, 0.125)


def selected(problem: _C.Problem, op: str, backend: str = "auto", isa: str = "") -> list[str]:
    return [k.name for k, reasons in _C.candidates(problem, op, backend, isa) if not reasons]


def test_table_is_sound() -> None:
    kernels = _C.kernels()
    names = [kernel.name for kernel in kernels]
    assert len(set(names)) == len(names)
    for dtype in _C.DTYPES:
        for op in ("forward", "backward"):
            assert any(
                k.backend == "naive" and k.op == op and dtype in k.dtypes for k in kernels
            ), f"no naive {op} for {dtype}"


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_isa_can_be_forced(op: str, dtype: str) -> None:
    problem = float_problem(dtype)
    if not _C.cpu_isas():
        pytest.skip("only baseline kernels on this architecture")
    for isa in _C.cpu_isas():
        fused = [
            kernel for kernel, reasons in _C.candidates(problem, op, "fna", isa) if not reasons
        ]
        assert [kernel.isa for kernel in fused] == [isa]
        naive = f"naive_{op}_{SUFFIXES[getattr(torch, dtype)]}"
        assert selected(problem, op, "auto", isa) == [fused[0].name, naive]
    assert selected(problem, op) == selected(problem, op, isa=_C.cpu_isas()[0])


def test_reasons() -> None:
    problem = float_problem("float64", head_dim=513)
    for kernel, reasons in _C.candidates(problem, "forward", "fna", ""):
        assert any("the problem is float64" in reason for reason in reasons)
        assert any("head dims up to 512, and the problem has 513" in reason for reason in reasons)
        if kernel.isa != _C.cpu_isas()[0]:
            assert len(reasons) == 3
    assert selected(problem, "forward") == ["naive_forward_f64"]


@pytest.mark.parametrize("isa", ["x86-64-v9", "baseline", "avx2"])
def test_unknown_isa(isa: str) -> None:
    with pytest.raises(ValueError, match=f"NATTEN_CPU_ISA = '{isa}' is not .* possible here"):
        _C.candidates(float_problem(), "forward", "auto", isa)


def test_unknown_names() -> None:
    problem = float_problem()
    nothing = [NOTHING] * 5
    with pytest.raises(ValueError, match="op = 'sideways' must be one of forward, backward"):
        _C.candidates(problem, "sideways", "auto", "")
    with pytest.raises(ValueError, match="no forward kernel called 'naive_backward_f32'"):
        _C.forward(problem, "naive_backward_f32", *nothing, 0, NOTHING, NOTHING, 1)
    with pytest.raises(ValueError, match="naive_forward_f64 computes float64, and the problem is"):
        _C.forward(problem, "naive_forward_f64", *nothing, 0, NOTHING, NOTHING, 1)
    with pytest.raises(ValueError, match="rpb must be given if and only if"):
        _C.forward(problem, "naive_forward_f32", *nothing, 16, NOTHING, NOTHING, 1)
    with pytest.raises(ValueError, match="dtype = 'int8' must be one of float64"):
        float_problem("int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3, "heads_kv": 2}, "heads = 3 must be a multiple of heads_kv = 2"),
        ({"heads_kv": 0}, "heads_kv = 0"),
        ({"head_dim": 0}, "head_dim = 0 must be at least 1"),
        ({"head_dim_value": -1}, "head_dim_value = -1"),
        ({"batch": -1}, "batch = -1"),
        ({"additional_keys": -1}, "additional_keys = -1"),
        ({"axes": ()}, "axes must hold 11 integers"),
        ({"axes": axis(8, 3)[:-1]}, "axes must hold 11 integers"),
        ({"axes": axis(8, 3) + axis(8, 9)}, r"kernel_size\[1\] = 9"),
        (
            {"axes": axis(8, 3) + axis(9, 3, queries=(0, 6), keys=(0, 6))},
            "axis 1 .* token 0 to token 6 .* only tokens 0 to 5; pass more keys, or correct grid",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_problems(arguments: dict[str, object], message: str) -> None:
    good = {
        "dtype": "float32",
        "axes": axis(8, 3),
        "batch": 1,
        "heads": 2,
        "heads_kv": 2,
        "head_dim": 8,
        "head_dim_value": 8,
        "additional_keys": 0,
        "has_rpb": False,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        _C.Problem(**{**good, **arguments})


# --- code generation -------------------------------------------------------------------------------------------------


@pytest.fixture
def codegen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "src/codegen"))
    return importlib.import_module


def test_compiled_rows_are_those_of_the_table(codegen: Callable[[str], ModuleType]) -> None:
    rows = codegen("table").ROWS
    compiled = [kernel.name for kernel in _C.kernels()]
    assert compiled == [row.name for row in rows if row.name in set(compiled)]
    assert set(compiled) >= {row.name for row in rows if row.isa.id in ("baseline", *_C.cpu_isas())}


def test_bad_rows_are_refused(codegen: Callable[[str], ModuleType]) -> None:
    table, generate = codegen("table"), codegen("generate")
    generate.check(table.ROWS, table.CUDA_ROWS)
    row = table.ROWS[0]
    with pytest.raises(ValueError, match=f"two rows of the kernel table are called {row.name}"):
        generate.check((row, row), ())
    with pytest.raises(ValueError, match="malformed row"):
        generate.check((table.Row("naive", "sideways", "f32", table.BASELINE, 64),), ())
    isa = table.Isa("x86-64-v9", "v9", ".*")
    with pytest.raises(ValueError, match="ISA x86-64-v9 is not in ISAS"):
        generate.check((table.Row("naive", "forward", "f32", isa, 64),), ())


def test_generated_files_change_only_when_they_differ(
    codegen: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    write = codegen("generate").write_if_different
    path = tmp_path / "file.cpp"
    write(path, "int x;\n")
    before = path.stat().st_mtime_ns
    write(path, "int x;\n")
    assert path.stat().st_mtime_ns == before
    write(path, "int y;\n")
    assert "int y;" in path.read_text()


def test_exports_of_an_isa_are_checked(
    codegen: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    source, binary = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    strangers = codegen("check_exports").strangers

    def exported(text: str) -> list[str]:
        source.write_text(text)
        subprocess.run([tool("c++"), "-std=c++17", "-c", source, "-o", binary], check=True)
        return strangers(tool("nm"), "natten::cpu::v4", [str(binary)])

    entry = "namespace natten::cpu::v4 { void f() {} }\n"
    assert exported(entry) == []
    assert exported(entry + "static void helper() {} void (*keep)() = helper;\n") != []
    assert exported("namespace natten::cpu::v4_bf16 { void f() {} }\n") != []
    shared = "#include <algorithm>\nnamespace natten::cpu::v4 { int f(int x) { return std::max(x, 1); } }\n"
    assert any("St3max" in name for name in exported(shared))
