# SPDX-License-Identifier: MIT
"""Which backend runs a problem, which kernel of it, and why not the others: one list answers all three."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from natten import _C, _flex, _settings
from natten._axes import AXIS_INTS, Axis
from natten._errors import reject
from natten._problem import Problem
from natten._settings import NattenContext

# In order of preference.
_COMPILED = tuple(dict.fromkeys(kernel.backend for kernel in _C.kernels()))
BACKENDS = ("auto", *_COMPILED, "flex", "reference")
# What the 0.2x generation of the package calls its backends.
_ALIASES = {
    **dict.fromkeys(("cutlass-fna", "hopper-fna", "blackwell-fna"), "fna"),
    **dict.fromkeys(("cutlass-fmha", "hopper-fmha", "blackwell-fmha"), "fna"),
    **dict.fromkeys(("flex-fna", "flex-fmha"), "flex"),
}
# What computes the gradients of an op.
_GRADIENT_OPS = {
    "forward": ("backward",),
    "qk": ("av", "av_transposed", "rpb_gradient"),
    "av": ("qk", "av_transposed"),
}
_FUSED_OPS = ("forward", "backward")
# Of the GPUs that CUDA kernels are for; ROCm calls its devices "cuda" too.
_HAS_CUDA = torch.version.cuda is not None
# Passed to the ops by compiled graphs, which outlive the context they are traced in: whatever is in force when they run.
IN_FORCE = ""

_backend_in_force: ContextVar[str] = ContextVar("natten_backend", default="auto")


def canonical(name: str) -> str:
    """The backend called `name`, which may be a name of the 0.2x generation, or one policy of a backend."""
    name = _ALIASES.get(name, name)
    if name not in BACKENDS:
        policies = _policies()
        lower = str(name).lower()
        if lower not in policies:
            known = ", ".join(map(repr, (*BACKENDS, *_ALIASES, *policies.values())))
            reject("backend", repr(name), f"one of {known}")
        name = policies[lower]
    return name


def is_policy(backend: str) -> bool:
    """Whether a backend's name narrows it down to one policy or instruction set, as "fna:Sm80" does."""
    return ":" in backend


@lru_cache
def _policies() -> dict[str, str]:
    kernels = (*_C.kernels("cpu"), *_C.kernels("cuda"), *_C.kernels("emulation"))
    names = [f"{kernel.backend}:{kernel.isa}" for kernel in kernels]
    return {name.lower(): name for name in names}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects the backend of all calls inside the context that do not name one themselves.

    Nests, and holds for the current thread and the current asyncio task only.

    Args:
        name: ``"auto"``, ``"fna"``, ``"gemm"`` (of the unfused operations), ``"naive"``, ``"flex"`` or
            ``"reference"``; or a name of the 0.2x generation of the package, such as ``"cutlass-fna"``; or one policy
            or instruction set of a compiled backend, such as ``"fna:sm80"`` and ``"fna:x86-64-v3"``, which then runs
            also where another one is preferred.

    Raises:
        ValueError: If there is no backend of that name.

    Example:
        >>> import natten, torch
        >>> x = torch.randn(1, 16, 2, 8)
        >>> with natten.use_backend("reference"):
        ...     natten.na1d(x, x, x, kernel_size=3).shape
        torch.Size([1, 16, 2, 8])
    """
    token = _backend_in_force.set(canonical(name))
    try:
        yield
    finally:
        _backend_in_force.reset(token)


def backend_in_force() -> str:
    """What `use_backend` selected, or ``"auto"``."""
    return _backend_in_force.get()


# For torch.compile, which cannot trace context variables: a constant of the graph.
backend_in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_isa() -> str:
    """The ISA that the environment variable NATTEN_CPU_ISA forces, or nothing. Read again for every call."""
    return (
        _C.forced_isa()
    )  # twice a call: a tenth of what os.environ takes to say that there is none


@lru_cache
def _arch_of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(device: torch.device) -> int | None:
    """The architecture of a GPU, 86 for SM86; 0 for the CPU; None for devices that no compiled kernel is for."""
    if device.type in (
        "cpu",
        "meta",
    ):  # tensors on "meta" have shapes only, and the ops know the shapes
        return 0
    if device.type != "cuda" or not _HAS_CUDA:
        return None
    return _arch_of_device(torch.cuda.current_device() if device.index is None else device.index)


def parse_arch(device: str) -> int:
    """The architecture that a user means by "sm_86"; 0 for "cpu"."""
    if device == "cpu":
        return 0
    match = re.fullmatch(r"sm_?(\d{2,3})", device.lower())
    if match is None:
        reject("device", repr(device), "'cpu', or an architecture such as 'sm_86'")
    return int(match[1])


def allows_tf32(op: str) -> bool:
    """Whether float32 products of `op` may round their factors to TF32.

    As torch.backends.cuda.matmul says; for unfused ops a switch may say otherwise.
    """
    switch = NattenContext.is_tf32_in_gemm_na_enabled
    if op not in _FUSED_OPS and switch is not None:
        return switch
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", precision)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def load_kernels(path: str | os.PathLike[str]) -> None:
    """Loads a library of CUDA kernels, which then come before those of the package that pad head dims as much.

    Such a library is built from a table of one's own (``python -m natten.build_kernels --help``).

    Args:
        path: The shared library.

    Raises:
        ValueError: If the file is no library of kernels, or was built for another version of natten.

    Example:
        >>> import natten
        >>> natten.load_kernels("libmy_kernels.so")  # doctest: +SKIP
    """
    _C.load_kernels(os.fspath(path))
    _policies.cache_clear()
    has_cuda_kernels.cache_clear()
    forget_choices()


# What clears the caches of choices elsewhere.
caches_of_choices: list[Callable[[], None]] = []


def forget_choices() -> None:
    """Lets backends and kernels be chosen anew: there are others now, or other settings."""
    launch.cache_clear()
    launch_unfused.cache_clear()
    for clear in caches_of_choices:
        clear()


_settings.after_change.append(forget_choices)


@dataclass(frozen=True)
class Candidate:
    """A way to run a problem.

    Attributes:
        backend: The backend it belongs to.
        kernel: What runs: a row of the kernel table, or the backend's name.
        reasons: Why it cannot run; empty: it can.
    """

    backend: str
    kernel: str
    reasons: tuple[str, ...] = ()

    def belongs_to(self, backend: str) -> bool:
        """Whether this, of all that `candidates` found for `backend`, is what was asked for."""
        return backend in ("auto", self.backend) or is_policy(backend)

    def __str__(self) -> str:
        return f"{self.kernel}: {'; '.join(self.reasons) or 'can run'}"


class Launch(NamedTuple):
    """What the ops hand to the core; no kernel at all where there is nothing to compute."""

    problem: _C.Problem
    kernel: str | None
    workspace_bytes: int


@lru_cache(maxsize=1024)
def launch(
    op: str,
    backend: str,
    isa: str,
    dtype: torch.dtype,
    flat_axes: tuple[int, ...],
    shapes: tuple[tuple[int, ...] | None, ...],
    scale: float,
    arch: int,
    allow_tf32: bool,
    tile_shapes: tuple[int, ...] = (),
) -> Launch:
    """The problem as the core sees it, and the kernel that runs `op` of it.

    `shapes` are those of the operands; `tile_shapes`, if there are any, as `normalize_tile_shapes` puts them.

    Raises:
        ArgumentError: If the shapes do not fit the axes or each other: the core would read out of bounds. If the kernel
            does not take these tiles.
        NotImplementedError: If no kernel of the backend can run it.
    """
    axes = _axes(flat_axes)
    half = len(tile_shapes) // 2
    tile_shapes = tile_shapes[half:] if op == "backward" else tile_shapes[:half]
    query, key, value, additional_keys, _, rpb = shapes
    assert query is not None
    assert key is not None
    assert value is not None
    batch, heads, head_dim = query[0], query[-2], query[-1]
    heads_kv, head_dim_value = key[-2], value[-1]
    additional = 0 if additional_keys is None else additional_keys[1]
    keys = tuple(axis.key_extent for axis in axes)
    fitting = (
        (batch, *(axis.query_extent for axis in axes), heads, head_dim),
        (batch, *keys, heads_kv, head_dim),
        (batch, *keys, heads_kv, head_dim_value),
        None if additional_keys is None else (batch, additional, heads_kv, head_dim),
        None if additional_keys is None else (batch, additional, heads_kv, head_dim_value),
        None if rpb is None else (heads, *(2 * axis.kernel_size - 1 for axis in axes)),
    )
    if shapes != fitting:
        reject("shapes of the operands", shapes, f"{fitting}, by the axes {axes}")
    problem = _C.Problem(
        str(dtype).removeprefix("torch."),
        flat_axes,
        batch,
        heads,
        heads_kv,
        head_dim,
        head_dim_value,
        additional,
        rpb is not None,
        scale,
        allow_tf32,
        tile_shapes,
    )
    # Dense attention to an empty sequence is the one problem without keys.
    is_empty = 0 in query or (0 in key and additional == 0)
    return _launch(problem, op, backend, isa, arch, is_empty, tile_shapes)


@lru_cache(maxsize=1024)
def launch_unfused(
    op: str,
    backend: str,
    isa: str,
    dtype: torch.dtype,
    flat_axes: tuple[int, ...],
    shapes: tuple[tuple[int, ...] | None, ...],
    arch: int,
    allow_tf32: bool,
) -> Launch:
    """The same for the unfused ops. `shapes`: of the tokens of queries and of keys, heads first; of weights and bias."""
    axes = _axes(flat_axes)
    query, key, weights, rpb = shapes
    rows = weights if query is None else query
    assert rows is not None
    batch, heads = rows[:2]
    heads_kv, head_dim = (heads, 1) if key is None else (key[1], key[-1])
    grid = tuple(axis.query_extent for axis in axes)
    keys = tuple(axis.key_extent for axis in axes)
    slots = math.prod(axis.kernel_size for axis in axes)
    fitting = (
        None if query is None else (batch, heads, *grid, head_dim),
        None if key is None else (batch, heads_kv, *keys, head_dim),
        (batch, heads, *grid, slots),
        None if rpb is None else (heads, *(2 * axis.kernel_size - 1 for axis in axes)),
    )
    if shapes != fitting:
        reject("shapes of the operands", shapes, f"{fitting}, by the axes {axes}")
    problem = _C.Problem(
        str(dtype).removeprefix("torch."),
        flat_axes,
        batch,
        heads,
        heads_kv,
        head_dim,
        head_dim,
        0,
        rpb is not None,
        1.0,
        allow_tf32,
    )
    return _launch(problem, op, backend, isa, arch, 0 in rows)


def _axes(flat_axes: tuple[int, ...]) -> list[Axis]:
    return [Axis(*flat_axes[i : i + AXIS_INTS]) for i in range(0, len(flat_axes), AXIS_INTS)]


def _launch(
    problem: _C.Problem,
    op: str,
    backend: str,
    isa: str,
    arch: int,
    is_empty: bool,
    tile_shapes: tuple[int, ...] = (),
) -> Launch:
    rows = [
        (kernel, (*reasons, *_switched_off(kernel.backend, op, backend)))
        for kernel, reasons in _C.candidates(problem, op, backend, isa, arch)
    ]
    able = [kernel for kernel, reasons in rows if not reasons]
    if not able:
        found = [Candidate(kernel.backend, kernel.name, why) for kernel, why in rows]
        raise _nothing_runs(backend, found)
    if is_empty:
        return Launch(problem, None, 0)
    chosen = _with_tiles(op, tile_shapes, able).name if any(tile_shapes) else able[0].name
    return Launch(problem, chosen, _C.workspace_bytes(problem, op, chosen, arch))


def _with_tiles(op: str, tile_shapes: tuple[int, ...], able: list[_C.Kernel]) -> _C.Kernel:
    """The best of the kernels that are `able` to run a problem which has tiles of these shapes.

    A CUDA kernel has tiles of the numbers of tokens that it was compiled for; where the best kernel has none, shapes
    say nothing. A backward kernel goes over its tiles twice, the second time with the roles of queries and keys
    exchanged: there, a shape counts for the pass, or both, where it has the right number of tokens.
    """
    if able[0].tile == (0, 0):
        return able[0]
    middle = len(tile_shapes) // 2
    shapes = tile_shapes[:middle], tile_shapes[middle:]
    tiled = [kernel for kernel in able if kernel.tile != (0, 0)]

    def takes(kernel: _C.Kernel) -> bool:
        possible = (kernel.tile, kernel.tile[::-1]) if op == "backward" else (kernel.tile,)
        return all(
            not any(shape) or any(math.prod(shape) == tile[side] for tile in possible)
            for side, shape in enumerate(shapes)
        )

    chosen = next(filter(takes, tiled), None)
    if chosen is None:
        prefix, conjunction = ("backward_", "or") if op == "backward" else ("", "and")
        reject(
            f"{prefix}q_tile_shape, {prefix}kv_tile_shape",
            " and ".join(f"{shape}" if any(shape) else "any" for shape in shapes),
            "boxes of as many tokens as a kernel is compiled for",
            "; ".join(f"{k.name} has {k.tile[0]} {conjunction} {k.tile[1]}" for k in tiled),
        )
    return chosen


def _switched_off(backend: str, op: str, asked: str) -> tuple[str, ...]:
    """Why a switch of `natten.context` keeps "auto" from a backend. Who asks for it by its name gets it."""
    if asked != "auto":
        return ()
    if op in _FUSED_OPS:
        if NattenContext.force_flex_attention and backend != "flex":
            return ("natten.force_flex_attention() was called",)
    elif backend == "gemm" and not NattenContext.is_gemm_na_enabled:
        return ("natten.use_gemm_na(False) was called",)
    return ()


def _nothing_runs(backend: str, candidates: list[Candidate]) -> NotImplementedError:
    lines = "\n".join(f"  {candidate}" for candidate in candidates)
    return NotImplementedError(f"no kernel of backend {backend!r} can run this problem:\n{lines}")


def candidates(
    problem: Problem,
    needs_grad: bool,
    isa: str,
    pretended: str | None = None,
    backend: str = "auto",
) -> list[Candidate]:
    """Every way to run the problem, in order of preference, each with the reasons why it cannot.

    `pretended`: the device that the tensors are taken to be on, as in `parse_arch`. If `backend` is one policy, only
    its kernels are ways to run it.
    """
    asked = backend if is_policy(backend) else "auto"
    found: list[Candidate] = []
    arch = arch_of(problem.device) if pretended is None else parse_arch(pretended)
    device_type = problem.device.type
    if pretended is not None:
        device_type = "cuda" if arch else "cpu"
    if arch is not None:
        core = _C.Problem(
            str(problem.dtype).removeprefix("torch."),
            problem.flat_axes,
            problem.batch,
            problem.heads,
            problem.heads_kv,
            problem.head_dim,
            problem.head_dim_value,
            problem.additional_keys,
            problem.has_rpb,
            problem.scale,
            bool(arch) and allows_tf32(problem.op),
        )
        where = (isa, arch, pretended is not None)
        gradients = [
            {row.backend for row, reasons in _C.candidates(core, op, asked, *where) if not reasons}
            for op in _GRADIENT_OPS[problem.op]
            if needs_grad and (problem.has_rpb or op != "rpb_gradient")
        ]
        for kernel, reasons in _C.candidates(core, problem.op, asked, *where):
            why = list(reasons)
            if not why and any(kernel.backend not in able for able in gradients):
                why.append("no backward kernel of its backend can run, and gradients are wanted")
            found.append(Candidate(kernel.backend, kernel.name, tuple(why)))
    else:
        why = [f"runs on the CPU or an NVIDIA GPU, and the tensors are on {device_type}"]
        rows = [kernel for kernel in _C.kernels() if kernel.op == problem.op]
        found += [Candidate(kernel.backend, kernel.name, tuple(why)) for kernel in rows]
    if is_policy(backend):
        return found
    found += _without_kernels(problem, device_type, needs_grad)
    found.append(Candidate("reference", "reference"))
    return [
        replace(c, reasons=c.reasons + _switched_off(c.backend, problem.op, backend)) for c in found
    ]


def _without_kernels(problem: Problem, device_type: str, needs_grad: bool) -> list[Candidate]:
    """Backends that have no kernels in the table for the problem's op."""
    ops: dict[str, list[str]] = {}
    for kernel in _C.kernels():
        ops.setdefault(kernel.backend, []).append(kernel.op)
    ops["flex"] = ["forward"]
    found = [
        Candidate(name, name, (f"computes {', '.join(dict.fromkeys(known))}; not {problem.op}",))
        for name, known in ops.items()
        if problem.op not in known
    ]
    if problem.op == "forward":
        reasons = _flex.reasons(
            device_type,
            problem.dtype,
            problem.head_dim,
            problem.head_dim_value,
            problem.has_rpb,
            needs_grad,
        )
        found.append(Candidate("flex", "flex", reasons))
    return found


def select(problem: Problem, needs_grad: bool, backend: str, isa: str) -> str:
    """The backend that runs the problem: `backend`, or the best one if that is "auto".

    Raises:
        NotImplementedError: If it cannot; lists every candidate and its reasons.
    """
    found = candidates(problem, needs_grad, isa, backend=backend)
    asked = [c for c in found if c.belongs_to(backend)]
    chosen = next((c for c in asked if not c.reasons), None)
    if chosen is None:
        raise _nothing_runs(backend, asked)
    if is_policy(backend):
        return backend
    if backend == "auto" and chosen.backend == "reference" and problem.device.type != "cpu":
        _warn_of_reference(problem.device.type)
    return chosen.backend


def select_in_graph(problem: Problem, backend: str | None) -> str:
    """The same for torch.compile, which cannot trace into the core.

    The choice among compiled kernels is left to the moment the graph runs: it may be on another machine.
    FlexAttention is no op of ours, and its mask no part of a graph: such calls break the graph, and run outside it.
    """
    if problem.device.type in ("cpu", "meta") or has_cuda_kernels():
        name = IN_FORCE if backend is None else canonical(backend)
        if name != "flex":
            return name
    else:
        name = backend_in_force() if backend is None else canonical(backend)
        if name == "reference":
            return name
    message = (
        f"torch.compile(fullgraph=True) cannot take in backend {name!r} on {problem.device.type}; "
        "let the graph break there, or choose backend='reference'"
    )
    raise NotImplementedError(message)


@lru_cache
def has_cuda_kernels() -> bool:
    """Whether a library of CUDA kernels came with the package, or was loaded."""
    return _HAS_CUDA and bool(_C.libraries())


# For torch.compile, which cannot trace into the core.
has_cuda_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _warn_of_reference(device_type: str) -> None:
    warnings.warn(
        f"no fast backend runs this problem on {device_type}: 'reference' does, slowly (said once; natten.explain "
        "lists the reasons)",
        stacklevel=2,
    )
