# SPDX-License-Identifier: MIT
"""What the kernel table has for a device, so that tests force all of it: instruction sets of a CPU, policies of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import natten
from natten import _C, _dispatch

# Where tests run that are not marked `cpu`, pytest's option --device: their tensors, and the part of the table that holds
# their kernels, which is "cpu", "cuda" or "emulation".
DEVICE = torch.device("cpu")
KERNELS = "cpu"

# CUDA kernels for the CPU; `make emulation` builds them.
EMULATION = Path(__file__).parents[1] / "build" / "emulation" / "libnatten_emulation.so"


@dataclass(frozen=True)
class Policy:
    """Kernels of one policy and data type, which a backend's name forces.

    Attributes:
        backend: That name, such as "fna:x86-64-v3" or "fna:Sm80".
        kernels: Those of the op.
        max_head_dim: The largest that kernels of it and of its gradients hold.
        precision: Type with as many digits as the products have: that of the tensors, but for TF32 float16.
        multiplies_tiles: Whether products take whole tiles, weights of 0 included: NaN and inf reach more than attends
            to them.
        obstacle: Why none of them can run here; empty: they can.
    """

    backend: str
    dtype: torch.dtype
    kernels: tuple[str, ...]
    max_head_dim: int
    precision: torch.dtype
    multiplies_tiles: bool
    obstacle: str

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}".replace(":", "-")


def policies(where: str = "", op: str = "forward") -> list[Policy]:
    """Of the table for "cpu", "cuda" or "emulation" (by default, of what tests run on).

    `op` is "forward", or "qk" for those of the unfused ops.
    """
    where = where or KERNELS
    ops = ("forward", "backward") if op == "forward" else ("qk", "av", "av_transposed")
    groups: dict[tuple[str, str], list[_C.Kernel]] = {}
    for kernel in _C.kernels(where):
        if kernel.op in ops:
            name = f"{kernel.backend}:{kernel.isa}"
            groups.setdefault((name, kernel.dtypes[0]), []).append(kernel)
    return [_policy(op, backend, dtype, rows, where) for (backend, dtype), rows in groups.items()]


def emulated_policies(op: str = "forward") -> list[Policy]:
    """Those of the CUDA kernels for the CPU, loaded if need be; none if they have not been built."""
    if EMULATION.exists() and not _C.kernels("emulation"):
        natten.load_kernels(EMULATION)
    return policies("emulation", op)


def _policy(op: str, backend: str, dtype: str, rows: list[_C.Kernel], where: str) -> Policy:
    largest: dict[str, int] = {}
    for kernel in rows:
        largest[kernel.op] = max(kernel.max_head_dim, largest.get(kernel.op, 0))
    problem = _C.Problem(dtype, (8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8), 1, 1, 1, 8, 8, 0, False, 1.0)
    arch = _dispatch.arch_of(DEVICE) if where == "cuda" else 0
    names = tuple(kernel.name for kernel in rows if kernel.op == op)
    found = _C.candidates(problem, op, backend, "", arch)
    reasons = [why for kernel, why in found if kernel.name in names]
    return Policy(
        backend=backend,
        dtype=getattr(torch, dtype),
        kernels=names,
        max_head_dim=min(largest.values()),
        precision=torch.float16 if rows[0].is_tf32 else getattr(torch, dtype),
        multiplies_tiles=rows[0].tile != (0, 0),
        obstacle="" if [] in reasons else f"{names[0]} {'; '.join(reasons[0])}",
    )


def use_device(name: str) -> None:
    """Makes `name` the device that tests run on; "emulation" is the CPU, with CUDA kernels.

    Raises:
        ValueError: If there is no such device here, or no kernel to test.
    """
    global DEVICE, KERNELS
    try:
        device = torch.device("cpu" if name == "emulation" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"--device {name}: torch {torch.__version__} has no such device here: {error}"
        raise ValueError(message) from error
    if device.type == "cuda" and not natten.has_cuda():
        message = f"--device {name}: this natten was built without CUDA kernels (NATTEN_CUDA)"
        raise ValueError(message)
    if name == "emulation" and not emulated_policies():
        message = f"--device {name}: there is no {EMULATION}; `make emulation` builds it"
        raise ValueError(message)
    DEVICE = device
    KERNELS = "emulation" if name == "emulation" else device.type
