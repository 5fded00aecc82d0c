# SPDX-License-Identifier: MIT
"""Which backend runs a problem, which kernel of it, and why not the others: one list answers all three."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch

from natten import _C, _flex, _settings
from natten._errors import ArgumentError, reject
from natten._problem import Problem
from natten._settings import NattenContext
from natten.types import Backend

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
FUSED_OPS = ("forward", "backward")
# Of the GPUs that CUDA kernels are for; ROCm calls its devices "cuda" too.
_HAS_CUDA = torch.version.cuda is not None
# Passed to the ops by compiled graphs, which outlive the context they are traced in: whatever is in force when they run.
IN_FORCE = ""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Choice = TypeVar("_Choice")

_backend_in_force: ContextVar[str] = ContextVar("natten_backend", default="auto")


def canonical(name: str) -> str:
    """The backend called `name`, which may be a name of the 0.2x generation, or one policy of a backend."""
    if isinstance(name, str):
        name = _ALIASES.get(name, name)
    if not isinstance(name, str) or name not in BACKENDS:
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


class use_backend(ContextDecorator):
    """Selects the backend of all calls inside the context that do not name one themselves.

    For a ``with`` statement, or for a function that it decorates. Called by itself it checks the name and selects
    nothing, of which it warns; the switches of `natten.context`, which hold for the whole process, act when called.

    It nests, and holds for the current thread and the current asyncio task:

    - A thread that is started inside of it begins with ``"auto"`` (unless Python lets threads inherit contexts, as its
      builds without a GIL do).
    - A worker of a DataLoader, if forked, begins with what is in force where iteration over the loader begins; if
      spawned, with ``"auto"``. The ``with`` belongs where the dataset calls natten.
    - A generator shares the context of whoever asks it for values: a ``with`` around a ``yield`` holds for the caller,
      too, until the generator goes on. It belongs between two values, or around the loop that asks for them.
    - Gradients are computed by the backend of the forward pass, wherever they are asked for.
    - torch.compile obeys what is in force when its graph runs; a ``with`` inside of what it compiles breaks the graph.

    Args:
        name: ``"auto"``, ``"fna"``, ``"gemm"`` (of the unfused operations), ``"naive"``, ``"flex"`` or
            ``"reference"``; or a name of the 0.2x generation of the package, such as ``"cutlass-fna"``; or one policy
            or instruction set of a compiled backend, such as ``"fna:Sm80"`` and ``"fna:x86-64-v3"``, which then runs
            also where another one is preferred.

    Raises:
        ValueError: If there is no backend of that name, when it is called; if what is decorated only makes a generator
            or coroutine, which would run outside.

    Example:
        >>> import natten, torch
        >>> x = torch.randn(1, 16, 2, 8)
        >>> with natten.use_backend("reference"):
        ...     natten.na1d(x, x, x, kernel_size=3).shape
        torch.Size([1, 16, 2, 8])
    """

    def __init__(self, name: Backend) -> None:
        self._name = canonical(name)
        self._tokens: list[Token[str]] = []
        self._is_used = False

    def __enter__(self) -> None:
        self._is_used = True
        self._tokens.append(_backend_in_force.set(self._name))

    def __exit__(self, *_: object) -> None:
        _backend_in_force.reset(self._tokens.pop())

    def __call__(self, func: _Function) -> _Function:
        """`func`, with the backend selected in each of its calls."""
        self._is_used = True
        if (
            inspect.isgeneratorfunction(func)
            or inspect.isasyncgenfunction(func)
            or inspect.iscoroutinefunction(func)
        ):
            wanted = "a function that runs when it is called"
            reject("what use_backend decorates", func, wanted, "write `with` in its body")
        return super().__call__(func)

    def _recreate_cm(self) -> use_backend:
        """One for each call of a decorated function, which several threads may run at once."""
        return use_backend(cast("Backend", self._name))

    def __del__(self) -> None:
        if not getattr(self, "_is_used", True):
            warnings.warn(
                f"natten.use_backend({self._name!r}) was never entered, and selected nothing: write "
                f"`with natten.use_backend({self._name!r}):`, or pass backend={self._name!r} to the call",
                RuntimeWarning,
                stacklevel=2,
            )


def backend_in_force() -> str:
    """What `use_backend` selected, or ``"auto"``."""
    return _backend_in_force.get()


# For torch.compile, which cannot trace context variables: a constant of the graph.
backend_in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_isa() -> str:
    """The ISA that the environment variable NATTEN_CPU_ISA forces, or nothing. Read again for every call."""
    # Twice a call: os.environ takes ten times as long to say that there is none.
    return _C.forced_isa()


def isa_obstacle(device_type: str, isa: str) -> str:
    """Why no compiled kernel runs on such a device while this ISA is forced, or nothing."""
    possible = _C.cpu_isas()
    if device_type != "cpu" or not isa or isa in possible:
        return ""
    known = f"possible here: {', '.join(possible)}" if possible else "there are none: unset it"
    return f"NATTEN_CPU_ISA = {isa!r} is not an instruction set that this CPU can run; {known}"


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
    match = re.fullmatch(r"sm_?(\d{2,3})", device.lower()) if isinstance(device, str) else None
    if match is None:
        reject("device", repr(device), "'cpu', or an architecture such as 'sm_86'")
    return int(match[1])


def allows_tf32(op: str) -> bool:
    """Whether float32 products of `op` may round their factors to TF32.

    As torch.backends.cuda.matmul says; for unfused ops a switch may say otherwise.
    """
    switch = NattenContext.is_tf32_in_gemm_na_enabled
    if op not in FUSED_OPS and switch is not None:
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
    has_code_for.cache_clear()
    forget_choices()


# What clears the caches of choices.
caches_of_choices: list[Callable[[], None]] = []


def forget_choices() -> None:
    """Lets backends and kernels be chosen anew: there are others now, or other settings."""
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


def switched_off(backend: str, op: str, asked: str) -> tuple[str, ...]:
    """Why a switch of `natten.context` keeps "auto" from a backend. Who asks for it by its name gets it."""
    if asked != "auto":
        return ()
    if op in FUSED_OPS:
        if NattenContext.force_flex_attention and backend != "flex":
            return ("natten.force_flex_attention() was called",)
    elif backend == "gemm" and not NattenContext.is_gemm_na_enabled:
        return ("natten.use_gemm_na(False) was called",)
    return ()


def nothing_runs(backend: str, candidates: list[Candidate]) -> NotImplementedError:
    """The error for that, with the reasons of every candidate."""
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
    obstacle = isa_obstacle(device_type, isa)
    if obstacle or device_type != "cpu":  # on "meta" nothing is computed, by whatever ISA
        isa = ""
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
            why = [obstacle] if obstacle else list(reasons)
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
    if obstacle and backend == "auto":  # what is slow does not stand in for what cannot run
        found = [replace(c, reasons=c.reasons or (obstacle,)) for c in found]
    return [
        replace(c, reasons=c.reasons + switched_off(c.backend, problem.op, backend)) for c in found
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


_KINDS = 1024  # of problems that choices are remembered for
_selected: dict[tuple[Any, ...], str] = {}
caches_of_choices.append(_selected.clear)


def select(problem: Problem, needs_grad: bool, backend: str, isa: str) -> str:
    """The backend that runs the problem: `backend`, or the best one if that is "auto".

    Raises:
        ArgumentError: If the ISA is none of this CPU's.
        NotImplementedError: If it cannot; lists every candidate and its reasons.
    """
    # What a choice depends on: nothing of the grid, which differs from call to call of who streams or packs.
    kind = (
        problem.op,
        problem.dtype,
        problem.device,
        problem.head_dim,
        problem.head_dim_value,
        problem.has_rpb,
        needs_grad,
        backend,
        isa,
    )
    name = _selected.get(kind)
    if name is None:
        name = _select(problem, needs_grad, backend, isa)
        remember(_selected, kind, name)
    return name


def remember(
    choices: dict[tuple[Any, ...], _Choice], kind: tuple[Any, ...], choice: _Choice
) -> None:
    """Keeps a choice for problems of the same kind."""
    if len(choices) >= _KINDS:
        choices.clear()
    choices[kind] = choice


def _select(problem: Problem, needs_grad: bool, backend: str, isa: str) -> str:
    found = candidates(problem, needs_grad, isa, backend=backend)
    asked = [c for c in found if c.belongs_to(backend)]
    chosen = next((c for c in asked if not c.reasons), None)
    if chosen is None:
        obstacle = isa_obstacle(problem.device.type, isa)
        raise ArgumentError(obstacle) if obstacle else nothing_runs(backend, asked)
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
    device = problem.device
    if device.type in ("cpu", "meta") or (device.type == "cuda" and has_code_for(device.index)):
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
def has_code_for(index: int | None) -> bool:
    """Whether there are CUDA kernels for this GPU's architecture, and a driver that runs them."""
    arch = arch_of(torch.device("cuda") if index is None else torch.device("cuda", index))
    return arch is not None and _C.has_code_for(arch)


# For torch.compile, which cannot trace into the core.
has_code_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _warn_of_reference(device_type: str) -> None:
    warnings.warn(
        f"no fast backend runs this problem on {device_type}: 'reference' does, slowly (said once; natten.explain "
        "lists the reasons)",
        stacklevel=2,
    )
