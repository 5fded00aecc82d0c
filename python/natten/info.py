# SPDX-License-Identifier: MIT
"""``python -m natten.info``: what this installation is, and what it would run."""

from __future__ import annotations

import platform

import torch

import natten
from natten import _C, _dispatch


def report() -> str:
    """Version, machine, the choice for each dtype, kernel tables, and libraries of CUDA kernels."""
    isas = _C.cpu_isas()
    forced = _dispatch.forced_isa()
    lines = [
        f"natten {natten.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"core: {_C.__file__}",
        f"machine: {platform.machine()}, {torch.get_num_threads()} threads",
        f"instruction sets of this CPU with kernels here, best first: {', '.join(isas) or 'none'}",
        _dispatch.isa_obstacle("cpu", forced)
        or f"NATTEN_CPU_ISA: {forced or 'not set: the best one is used'}",
        f"backends: {', '.join(_dispatch.BACKENDS)}; in force: {_dispatch.backend_in_force()}",
        "",
        "what runs a 2-D problem of head dim 64 on the CPU:",
    ]
    lines += _choices("cpu")
    for index in range(torch.cuda.device_count()) if torch.version.cuda else ():
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, SM{major}{minor}"
        lines += ["", f"what runs it on cuda:{index} ({name}):", *_choices(f"cuda:{index}")]
    lines += ["", "kernel table of the CPU, in order of preference:"]
    lines += [_row(kernel, kernel.isa) for kernel in _C.kernels()]
    lines += ["", "libraries of CUDA kernels:"]
    lines += [f"  {path}: {count} kernels, {toolkit}" for path, toolkit, count in _C.libraries()]
    if not _C.libraries():
        lines.append("  none: this natten was built without (NATTEN_CUDA)")
    rows = _C.kernels("cuda")
    there = [kernel for kernel in rows if kernel.archs]
    if there:
        lines += ["", "kernel table of GPUs, in order of preference:"]
        lines += [_row(kernel, f"{kernel.isa:9} {_archs(kernel)}") for kernel in there]
    if len(there) < len(rows):
        lines.append(f"  {len(rows) - len(there)} rows of the table for GPUs are not in this build")
    return "\n".join(lines)


def _choices(device: str) -> list[str]:
    lines = []
    for dtype in natten._problem.DTYPES:
        x = torch.empty(1, 8, 8, 1, 64, dtype=dtype, device=device, requires_grad=True)
        selected = natten.explain(x, x, x, kernel_size=3).selected
        lines.append(f"  {dtype!s:15} {selected.kernel if selected else 'nothing'}")
    return lines


def _row(kernel: _C.Kernel, written_for: str) -> str:
    is_limited = kernel.max_head_dim < 2**31 - 1
    limit = f"head dims up to {kernel.max_head_dim}" if is_limited else "any head dim"
    return f"  {kernel.name:36} {written_for:15} {', '.join(kernel.dtypes)}, {limit}"


def _archs(kernel: _C.Kernel) -> str:
    compiled = ", ".join(f"SM{arch}" for arch in kernel.archs)
    end = " and later" if kernel.max_arch == 2**31 - 1 else f" to SM{kernel.max_arch}"
    return f"SM{kernel.min_arch}{end}, compiled for {compiled}"


if __name__ == "__main__":
    print(report())  # noqa: T201
