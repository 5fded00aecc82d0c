# SPDX-License-Identifier: MIT
"""Memory of calls on the CPU: pages of results and of scratch memory, and what a kernel on a GPU is given."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import natten
from natten import _C, _ops

pytestmark = pytest.mark.cpu

PAGE = resource.getpagesize()
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# In a process of its own, as what malloc keeps depends on all that was freed before.
FAULTS = """
import json, resource, sys, torch, natten
from natten.functional import na2d_av, na2d_qk

torch.set_num_threads(2)
warm, calls, sides = json.loads(sys.argv[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults_of(run):
    for _ in range(warm):
        run()
    before = faults()
    for _ in range(calls):
        run()
    return (faults() - before) / calls

found = {}
for side in sides:
    query, key, value = torch.randn(3, 1, side, side, 4, 64).unbind()
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    first = [t.movedim(-2, 1).contiguous() for t in (query, key, value)]
    found[side] = {
        "forward": faults_of(lambda: natten.na2d(query, key, value, 5)),
        "backward": faults_of(lambda: torch.autograd.grad(natten.na2d(*leaves, 5), leaves, value)),
        "unfused": faults_of(lambda: na2d_av(na2d_qk(*first[:2], 5), first[2], 5)),
    }
print(json.dumps(found))
"""
# Rows of results as large as the output.
RESULTS = {"forward": 1, "backward": 4, "unfused": 1 + 25 / 64}


def shares_of_pages(warm: int, calls: int, *sides: int) -> dict[tuple[str, str], float]:
    """Page faults of warm calls, in pages of their results, by side of the picture and call."""
    command = (sys.executable, "-c", FAULTS, json.dumps([warm, calls, sides]))
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        (side, call): faults / (RESULTS[call] * int(side) ** 2 * 4 * 64 * 4 / PAGE)
        for side, calls in found.items()
        for call, faults in calls.items()
    }


def test_results_that_fit_the_heap_stay_there() -> None:
    shares = shares_of_pages(10, 20, 32, 64)
    assert max(shares.values()) < 0.1, shares


def test_large_results_have_huge_pages() -> None:
    """Without huge pages, one fault a page, and no second thread that waits for the same one."""
    allowed = HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()
    shares = shares_of_pages(1, 2, 256)
    assert max(shares.values()) < (0.1 if allowed else 1.1), shares


BACKENDS = ("fna", "naive")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scratch_memory_is_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm call that is given its results has no page fault at all."""
    torch.set_num_threads(2)
    query, key, value = (torch.randn(1, 40, 72, 2, 32, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 25, 25, requires_grad=True)
    inputs = (query, key, value, rpb)
    arguments = {"kernel_size": 13 if backend == "fna" else 3, "backend": backend}
    table = rpb if backend == "fna" else rpb[:, 10:15, 10:15]

    def run() -> tuple[torch.Tensor, ...]:
        output = natten.na2d(query, key, value, rpb=table, **arguments)
        return torch.autograd.grad(output, inputs, key)

    results = _ops._empty_output(query, value)
    operands = _ops.Operands(query, key, value, None, None, table.detach().contiguous())
    gradients = _ops._empty_gradients(operands)
    expected = run()
    monkeypatch.setattr(_ops, "_empty_output", lambda *_: results)
    monkeypatch.setattr(_ops, "_empty_gradients", lambda *_: gradients)
    for _ in range(3):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        found = run()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 20  # Python's own
    for right, result in zip(expected, found, strict=True):
        assert torch.equal(right, result)


def test_scratch_memory_is_released() -> None:
    natten.release_scratch_memory()  # what other tests left, of more threads perhaps
    x = torch.randn(1, 20, 20, 2, 32)
    expected = natten.na2d(x, x, x, 5, backend="fna")
    kept = natten.release_scratch_memory()
    assert 0 < kept <= torch.get_num_threads() * 16 << 20
    assert natten.release_scratch_memory() == 0
    assert torch.equal(natten.na2d(x, x, x, 5, backend="fna"), expected)
    assert natten.release_scratch_memory() > 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_no_scratch_memory() -> None:
    x = torch.randn(1, 20, 20, 2, 32)
    natten.na2d(x, x, x, 5, backend="fna")
    child = os.fork()
    if child == 0:
        was_clean = _C.release_scratch() == 0
        natten.na2d(x, x, x, 5, backend="fna")
        os._exit(0 if was_clean and _C.release_scratch() > 0 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert natten.release_scratch_memory() > 0


@pytest.mark.parametrize("wanted", [0, 1000])
def test_workspace_on_a_gpu(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocated, and aligned, if a kernel wants one; else there is none."""
    allocated: list[int] = []

    def new_empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(size)
        return torch.empty(size, dtype=dtype)

    query: Any = SimpleNamespace(is_cpu=False, device=torch.device("cuda"), new_empty=new_empty)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(_ops._dispatch, "arch_of", lambda _: 80)
    given: list[Any] = []
    _ops._run(lambda *arguments: given.extend(arguments), query, wanted, "argument")
    argument, _, arch, stream, address = given
    assert (argument, arch, stream) == ("argument", 80, 7)
    assert len(allocated) == (wanted > 0)
    assert all(size >= wanted for size in allocated)
    assert (address == 0) == (wanted == 0)
    assert address % 256 == 0
