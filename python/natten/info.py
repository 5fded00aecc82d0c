# SPDX-License-Identifier: MIT
"""``python -m natten.info``: what this installation is, and what it would run."""

from __future__ import annotations

import platform

import torch

import natten
from natten import _C, _dispatch


def report() -> str:
    """Version, machine, kernel table, and the choice for each dtype."""
    isas = _C.cpu_isas()
    forced = _dispatch.forced_isa()
    lines = [
        f"natten {natten.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"core: {_C.__file__}",
        f"machine: {platform.machine()}, {torch.get_num_threads()} threads",
        f"instruction sets of this CPU with kernels here, best first: {', '.join(isas) or 'none'}",
        f"NATTEN_CPU_ISA: {forced or 'not set: the best one is used'}",
        f"backends: {', '.join(_dispatch.BACKENDS)}; in force: {_dispatch.backend_in_force()}",
        "",
        "what runs a 2-D problem of head dim 64 on the CPU:",
    ]
    for dtype in natten._problem.DTYPES:
        x = torch.empty(1, 8, 8, 1, 64, dtype=dtype, requires_grad=True)
        selected = natten.explain(x, x, x, kernel_size=3).selected
        lines.append(f"  {dtype!s:15} {selected.kernel if selected else 'nothing'}")
    lines += ["", "kernel table, in order of preference:"]
    for kernel in _C.kernels():
        dtypes = ", ".join(kernel.dtypes)
        limit = (
            "any head dim"
            if kernel.max_head_dim >= 2**31 - 1
            else f"head dims up to {kernel.max_head_dim}"
        )
        lines.append(f"  {kernel.name:30} {kernel.isa:15} {dtypes}, {limit}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())  # noqa: T201
