# SPDX-License-Identifier: MIT
"""Peak memory of one call above its inputs and outputs, in a process of its own: ``python -m bench.memory``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import unfused
from bench.cases import CASES, Case
from bench.measure import FORWARD, FORWARD_BACKWARD
from bench.methods import OURS, Problem, build

UNFUSED = ("qk", "av")


def extra_bytes(problem: Problem, direction: str, threads: int) -> int:
    """What a first call of that size needs beyond its inputs and outputs (of which LSE is one)."""
    asked = json.dumps([problem.case.name, problem.dtype, problem.head_dim, direction, threads])
    command = (sys.executable, "-m", "bench.memory", asked)
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _unfused(problem: Problem, op: str) -> Callable[[], Tensor]:
    """The op as a call."""
    query, key, value = (tensor.movedim(-2, 1).contiguous() for tensor in problem.operands())
    pair = unfused.ours(problem)
    if op == "qk":
        return lambda: pair.qk(query, key)
    weights = torch.rand(*query.shape[:-1], math.prod(problem.case.kernel_size)).to(query.dtype)
    return lambda: pair.av(weights, value)


def _run(problem: Problem, direction: str) -> int:
    """The peak resident memory of the call, less what was resident before and what came out."""
    attention = build(OURS, problem)
    ones = (1,) * len(problem.case.grid)
    one_token = Problem(Case("one token", ones, ones), problem.dtype, problem.head_dim)
    tiny = build(OURS, one_token)
    run: Callable[[], object]
    if direction in UNFUSED:
        _unfused(one_token, direction)()
        run = _unfused(problem, direction)
    elif direction == FORWARD:
        tiny.forward()()
        run = attention.forward()
    else:
        tiny.forward_backward()()
        run = attention.forward_backward()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    if isinstance(result, Tensor) and direction in UNFUSED:
        return peak - before - result.nbytes
    value = attention.operands[2]
    outputs = value.nbytes + 4 * value.numel() // problem.head_dim
    if direction == FORWARD_BACKWARD:
        gradients = result if isinstance(result, tuple) else (result,)
        outputs += sum(gradient.nbytes for gradient in gradients if isinstance(gradient, Tensor))
    return peak - before - outputs


def main() -> None:
    name, dtype, head_dim, direction, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = next(case for case in CASES if case.name == name)
    print(_run(Problem(case, dtype, head_dim), direction))


if __name__ == "__main__":
    main()
