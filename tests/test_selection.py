# SPDX-License-Identifier: MIT
"""Which kernel each GPU would run, asked of a machine without one: ``natten.explain(device="sm_86")``."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

import natten
from natten import _C

pytestmark = pytest.mark.cpu  # asks about devices without being on them

# What the architectures are good for: the policy that float16, bfloat16 and float32 (without and with TF32) run with.
LATER = (90, 100, 103, 120, 121)  # without kernels of their own
POLICIES = {
    **dict.fromkeys((50, 52, 53, 60, 61, 62), ("Sm50", "Sm50", "Sm50", "Sm50")),
    **dict.fromkeys((70, 72), ("Sm70", "Sm50", "Sm50", "Sm50")),
    75: ("Sm75", "Sm50", "Sm50", "Sm50"),
    **dict.fromkeys((80, 86, 87, 89), ("Sm80", "Sm80", "Sm80Simt", "Sm80Tf32")),
}
KINDS = (
    (torch.float16, False),
    (torch.bfloat16, False),
    (torch.float32, False),
    (torch.float32, True),
)
SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
BUCKETS = (32, 64, 128, 256)
HEAD_DIMS = (1, 16, 32, 33, 64, 80, 128, 129, 256)


@pytest.fixture
def tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def tensors(dtype, head_dim, head_dim_value=None, requires_grad=False):
    query = torch.empty(1, 9, 9, 2, head_dim, dtype=dtype, requires_grad=requires_grad)
    return query, query, torch.empty(1, 9, 9, 2, head_dim_value or head_dim, dtype=dtype)


def problem(dtype, head_dim, head_dim_value, allow_tf32):
    axis = (9, 3, 1, 1, 0, 0, 0, 0, 9, 0, 9)
    name = str(dtype).removeprefix("torch.")
    sizes = (1, 2, 2, head_dim, head_dim_value, 0)
    return _C.Problem(name, 2 * axis, *sizes, False, 1.0, allow_tf32)


def chosen(op, dtype, head_dim, head_dim_value, allow_tf32, arch):
    """The row that would compute `op` of a problem on a pretended device."""
    rows = _C.candidates(
        problem(dtype, head_dim, head_dim_value, allow_tf32), op, "auto", "", arch, True
    )
    return next(kernel for kernel, reasons in rows if not reasons)


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["fp16", "bf16", "fp32", "tf32"])
@pytest.mark.parametrize("arch", POLICIES)
def test_every_architecture(arch, kind, op):
    """The architecture's policy, in the smallest bucket that holds both head dims; naive kernels beyond them."""
    dtype, allow_tf32 = KINDS[kind]
    for head_dim, head_dim_value in product(HEAD_DIMS, (16, 256)):
        kernel = chosen(op, dtype, head_dim, head_dim_value, allow_tf32, arch)
        bucket = next(size for size in BUCKETS if size >= max(head_dim, head_dim_value))
        assert (kernel.backend, kernel.op) == ("fna", op)
        assert (kernel.isa, kernel.max_head_dim) == (POLICIES[arch][kind], bucket)
        assert kernel.dtypes == (str(dtype).removeprefix("torch."),)
        assert kernel.is_tf32 == (POLICIES[arch][kind] == "Sm80Tf32")
    for head_dim in (257, 512, 1000):
        kernel = chosen(op, dtype, 16, head_dim, allow_tf32, arch)
        assert kernel.name == f"naive_{op}_{SHORT[dtype]}_cuda"


@pytest.mark.parametrize("op", ["qk", "av", "av_transposed"])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["fp16", "bf16", "fp32", "tf32"])
@pytest.mark.parametrize("arch", POLICIES)
def test_unfused_ops_of_every_architecture(arch, kind, op):
    """The same policies, by backend gemm; naive where fused attention has it."""
    dtype, allow_tf32 = KINDS[kind]
    for head_dim in HEAD_DIMS:
        kernel = chosen(op, dtype, head_dim, head_dim, allow_tf32, arch)
        bucket = next(size for size in BUCKETS if size >= head_dim)
        assert (kernel.backend, kernel.op, kernel.isa) == ("gemm", op, POLICIES[arch][kind])
        assert kernel.max_head_dim == bucket
    assert chosen(op, dtype, 257, 257, allow_tf32, arch).backend == "naive"
    assert chosen(op, torch.float64, 64, 64, allow_tf32, arch).backend == "naive"


@pytest.mark.parametrize("name", ["gemm:Sm80", "gemm:Sm70"])
def test_kernels_alike_on_all_architectures_belong_to_every_policy(name):
    half = problem(torch.float16, 64, 64, False)
    rows = _C.candidates(half, "rpb_gradient", name, "", 86, True)
    able = [kernel for kernel, reasons in rows if not reasons]
    assert [(kernel.backend, kernel.isa) for kernel in able] == [("gemm", "naive")]
    # But not to the CPU's instruction sets, nor to another backend.
    (isa, *_) = _C.cpu_isas()
    for other in (f"gemm:{isa}", "fna:Sm80"):
        rows = _C.candidates(half, "rpb_gradient", other, "")
        assert not any(kernel.is_cuda for kernel, _ in rows)


def test_the_documentation_says_the_same():
    readme = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| SM(\d+)(?: to SM(\d+))?: [\w, ]+ \| (.*) \|$", readme, re.MULTILINE)
    said = {
        arch: tuple(cell.strip("`") for cell in cells.split(" | "))
        for first, last, cells in rows
        for arch in (*POLICIES, *LATER)
        if int(first) <= arch <= int(last or first)
    }
    assert said == {**POLICIES, **dict.fromkeys(LATER, POLICIES[89])}


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("arch", [*POLICIES, *LATER])
def test_float64_is_for_the_naive_kernels(arch, op):
    assert chosen(op, torch.float64, 64, 64, True, arch).name == f"naive_{op}_f64_cuda"


@pytest.mark.parametrize("arch", LATER)
def test_later_architectures_run_what_ampere_runs(arch):
    for kind, (dtype, allow_tf32) in enumerate(KINDS):
        assert chosen("forward", dtype, 64, 64, allow_tf32, arch).isa == POLICIES[80][kind]


@pytest.mark.parametrize("tf32", [False, True], indirect=True)
@pytest.mark.parametrize("device", ["sm_61", "sm75", "SM_86"])
def test_explain(device, tf32):
    policies = POLICIES[int(device[-2:])]
    for kind, (dtype, wants_tf32) in enumerate(KINDS):
        if dtype == torch.float32 and wants_tf32 != tf32:
            continue
        found = natten.explain(*tensors(dtype, 40), kernel_size=3, device=device)
        start = f"fna_forward_{SHORT[dtype]}_{policies[kind].lower()}_d64_"
        assert found.selected.kernel.startswith(start)
        assert found.selected.backend == "fna"
        # Preference: all that comes before it cannot run, and says why.
        before = found.candidates[: found.candidates.index(found.selected)]
        assert all(candidate.reasons for candidate in before)
        assert found.candidates[-1].backend == "reference"


def reasons_of(name, dtype, device, head_dim=64, **settings):
    found = natten.explain(*tensors(dtype, head_dim), kernel_size=3, device=device, **settings)
    (candidate,) = (c for c in found.candidates if c.kernel == name)
    return candidate.reasons


def name_of(op, dtype, policy, bucket):
    (name,) = (
        kernel.name
        for kernel in _C.kernels("cuda")
        if (kernel.op, kernel.isa, kernel.max_head_dim) == (op, policy, bucket)
        and kernel.name.startswith(f"fna_{op}_{SHORT[dtype]}_")
    )
    return name


@pytest.mark.parametrize("tf32", [False], indirect=True)
def test_reasons(tf32):
    half, single = torch.float16, torch.float32
    sm80 = name_of("forward", half, "Sm80", 64)
    assert reasons_of(sm80, half, "sm_86") == ()
    assert reasons_of(sm80, half, "sm_75") == (
        "is for SM80 and later, and the tensors are on SM75",
    )
    assert reasons_of(sm80, single, "sm_86", 128) == (
        "computes float16, and the problem is float32",
        "handles head dims up to 64, and the problem has 128",
    )
    sm70 = name_of("forward", half, "Sm70", 64)
    assert reasons_of(sm70, half, "sm_80") == ("is for SM70 to SM74, and the tensors are on SM80",)
    rounding = name_of("forward", single, "Sm80Tf32", 64)
    assert reasons_of(rounding, single, "sm_80") == (
        "rounds to TF32, which torch.backends.cuda.matmul does not allow",
    )


def test_architectures_to_come_run_the_newest_policy():
    found = natten.explain(*tensors(torch.float16, 64), kernel_size=3, device="sm_150")
    assert found.selected.backend == "fna"
    assert "_sm80_" in found.selected.kernel


def test_code_that_is_not_there():
    """On a device that is not pretended, code has to be there."""
    if any(path.endswith("libnatten_cuda.so") for path, _, _ in _C.libraries()):
        pytest.skip("this build has CUDA kernels")
    rows = _C.candidates(problem(torch.float16, 64, 64, False), "forward", "fna", "", 86)
    wanted = "is not in this build of natten (NATTEN_CUDA, NATTEN_CUDA_ARCHS)"
    assert all(wanted in reasons for _, reasons in rows)


@pytest.mark.parametrize("name", ["fna:sm75", "FNA:SM75"])
def test_a_policy_runs_on_newer_architectures_when_named(name):
    query, key, value = tensors(torch.float16, 64)
    found = natten.explain(query, key, value, kernel_size=3, device="sm_89", backend=name)
    assert found.selected.kernel.startswith("fna_forward_f16_sm75_d64_")
    older = natten.explain(query, key, value, kernel_size=3, device="sm_70", backend=name)
    assert older.selected is None
    assert all("and the tensors are on SM70" in " ".join(c.reasons) for c in older.candidates)


def test_gradients_need_a_backward_kernel_of_the_backend():
    query, key, value = tensors(torch.float16, 64, requires_grad=True)
    found = natten.explain(query, key, value, kernel_size=3, device="sm_86")
    assert found.selected.kernel == name_of("forward", torch.float16, "Sm80", 64)


@pytest.mark.parametrize("device", ["sm_8", "cuda", "sm_8x", ""])
def test_unknown_device(device):
    with pytest.raises(ValueError, match=r"device = .*; wanted 'cpu', or an architecture"):
        natten.explain(*tensors(torch.float16, 64), kernel_size=3, device=device)
