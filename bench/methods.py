# SPDX-License-Identifier: MIT
"""Neighborhood attention, and the exact ways to compute the same that torch offers without it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import natten
from bench.cases import Case
from natten import _C

Operands = tuple[Tensor, Tensor, Tensor]

OURS = "natten"
# Ways to compute the same.
ALTERNATIVES = ("sdpa mask", "flex", "gather")
# Attention of all tokens to all, by the fastest kernel that torch has for it: not the same, but what it has to beat.
DENSE = "dense"
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Largest difference from ours at which a method counts as the same: rounding of probabilities and outputs of size 1.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_MAX_GATHER_BYTES = 6 << 30
_MAX_MASK_BYTES = 6 << 30


class UnavailableError(Exception):
    """A method cannot run the problem, and why."""


@dataclass(frozen=True)
class Problem:
    """What is measured: a case in a data type, a head dim and on a device."""

    case: Case
    dtype: str
    head_dim: int
    device: str = "cpu"

    def operands(self) -> Operands:
        """Random query, key and value `[batch, *grid, heads, head_dim]`, always the same."""
        shape = (self.case.batch, *self.case.grid, self.case.heads, self.head_dim)
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator) for _ in range(3)]
        query, key, value = (t.to(self.device, DTYPES[self.dtype]) for t in made)
        return query, key, value


@dataclass(frozen=True)
class Attention:
    """A method bound to a problem: operands in the layout it likes best, and what it does with them."""

    operands: Operands
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    heads_first: bool = (
        True  # [batch, heads, tokens, head_dim] instead of [batch, *grid, heads, head_dim]
    )

    def forward(self) -> Callable[[], Tensor]:
        operands = [t.detach() for t in self.operands]
        return lambda: self.attend(*operands)

    def forward_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [t.detach().clone().requires_grad_() for t in self.operands]
        d_output = torch.ones_like(leaves[2])
        return lambda: torch.autograd.grad(self.attend(*leaves), leaves, d_output)

    def heads_last(self, output: Tensor) -> Tensor:
        """The output, as `[batch, tokens, heads, head_dim]`."""
        return output.transpose(1, 2) if self.heads_first else output.flatten(1, -3)


def build(method: str, problem: Problem, *, backward: bool = False) -> Attention:
    """The method, ready to run.

    Raises:
        UnavailableError: If it cannot run.
    """
    if method == OURS or method in policies(problem):
        case, operands = problem.case, problem.operands()
        backend = "auto" if method == OURS else method
        settings = {
            "kernel_size": case.kernel_size,
            "stride": case.strides,
            "backend": backend,
        }
        if natten.explain(*operands, **settings).selected is None:
            message = "not in this build, or not for this GPU"
            raise UnavailableError(message)
        na = (natten.na1d, natten.na2d, natten.na3d)[len(case.grid) - 1]
        return Attention(operands, functools.partial(na, **settings), heads_first=False)
    return Attention(_heads_first(problem), _BUILDERS[method](problem, backward))


def _heads_first(problem: Problem) -> Operands:
    query, key, value = problem.operands()
    layout = [t.flatten(1, -3).transpose(1, 2).contiguous() for t in (query, key, value)]
    return layout[0], layout[1], layout[2]


def policies(problem: Problem) -> tuple[str, ...]:
    """What on a GPU may run the problem, besides the best kernel: the policies of older architectures, too."""
    if problem.device == "cpu":
        return ()
    dtype = str(DTYPES[problem.dtype]).removeprefix("torch.")
    rows = [row for row in _C.kernels("cuda") if row.op == "forward" and row.dtypes == (dtype,)]
    rounds = problem.dtype == "tf32"
    names = (f"{row.backend}:{row.isa}" for row in rows if not row.is_tf32 or rounds)
    return tuple(name for name in dict.fromkeys(names) if name.startswith("fna:"))


def methods_on(problem: Problem) -> tuple[str, ...]:
    """What is measured beside ours."""
    if problem.device == "cpu":
        return ALTERNATIVES
    return (*ALTERNATIVES, DENSE, *policies(problem))


def _window_begin(token: Tensor, extent: int, kernel_size: int, stride: int) -> Tensor:
    # Written out here so that FlexAttention can compile it; `check` compares the results with ours.
    leader = (token // stride * stride + stride // 2).clamp(max=extent - 1)
    return (leader - kernel_size // 2).clamp(0, extent - kernel_size)


def _axes(case: Case) -> list[tuple[int, int, int]]:
    """Extent, kernel size and stride of each axis."""
    return list(zip(case.grid, case.kernel_size, case.strides, strict=True))


def _sdpa(problem: Problem, backward: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if problem.case.tokens**2 > _MAX_MASK_BYTES:
        message = f"the mask would take {problem.case.tokens**2 / 1e9:.0f} GB"
        raise UnavailableError(message)
    mask = torch.ones(1, 1, dtype=torch.bool, device=problem.device)
    for extent, kernel_size, stride in _axes(problem.case):
        token = torch.arange(extent, device=problem.device)
        distance = token - _window_begin(token, extent, kernel_size, stride)[:, None]
        axis = (distance >= 0) & (distance < kernel_size)
        rows, columns = mask.shape
        outer = mask[:, None, :, None] & axis[None, :, None, :]
        mask = outer.reshape(rows * extent, columns * extent)
    return functools.partial(functional.scaled_dot_product_attention, attn_mask=mask)


def _dense(problem: Problem, backward: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def by(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return functional.scaled_dot_product_attention(query, key, value)

        return attend

    operands = _heads_first(problem)
    seconds = {}
    for kernel in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        attend = by(kernel)
        with contextlib.suppress(RuntimeError):  # "no available kernel": not for this type or GPU
            seconds[attend] = _seconds(attend, operands)
    if not seconds:
        message = "torch has no fused attention here"
        raise UnavailableError(message)
    return min(seconds, key=seconds.__getitem__)


def _flex(problem: Problem, backward: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if backward and problem.device == "cpu":
        message = "FlexAttention has no backward on CPU"
        raise UnavailableError(message)
    axes = _axes(problem.case)

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = torch.ones((), dtype=torch.bool, device=query.device)
        for extent, size, stride in reversed(axes):
            distance = key % extent - _window_begin(query % extent, extent, size, stride)
            inside = inside & (distance >= 0) & (distance < size)
            query, key = query // extent, key // extent
        return inside

    # A graph of its own for every problem: nothing is compiled for shapes in general.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    operands = _heads_first(problem)
    tokens = problem.case.tokens

    def with_blocks(size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        blocks = create_block_mask(
            in_window, None, None, tokens, tokens, device=problem.device, BLOCK_SIZE=size
        )
        return functools.partial(compiled, block_mask=blocks)

    # 128 is the default; on a CPU, 32 is up to 1.6 times faster on some problems and slower on others.
    sizes = (128, 32) if problem.device == "cpu" else (128,)
    return min(map(with_blocks, sizes), key=lambda attend: _seconds(attend, operands))


def _seconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], operands: Operands) -> float:
    def timed() -> float:
        start = time.perf_counter()
        output = attend(*operands)
        if not output.is_cpu:
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    timed()  # compiles
    return min(timed() for _ in range(3))


def gatherer(problem: Problem, *, backward: bool) -> Callable[[Tensor], Tensor]:
    """`[batch, heads, tokens, head_dim]` to the rows of every window, `[batch, heads, tokens, window, head_dim]`.

    Raises:
        UnavailableError: If keys and values of all windows (backward, their gradients, too) take too much memory.
    """
    case = problem.case
    window = case.pairs // case.tokens
    needed = (4 if backward else 2) * case.batch * case.heads * case.pairs
    needed *= problem.head_dim * DTYPES[problem.dtype].itemsize
    if needed > _MAX_GATHER_BYTES:
        message = f"gathered tensors would take {needed / 1e9:.0f} GB"
        raise UnavailableError(message)
    index = torch.zeros(1, 1, dtype=torch.int64)
    for extent, kernel_size, stride in _axes(case):
        begin = _window_begin(torch.arange(extent), extent, kernel_size, stride)
        axis = begin[:, None] + torch.arange(kernel_size)
        outer = index[:, None, :, None] * extent + axis[None, :, None, :]
        index = outer.reshape(len(index) * extent, index.shape[1] * kernel_size)
    flat_index = index.flatten().to(problem.device)
    return lambda rows: rows.index_select(2, flat_index).unflatten(2, (-1, window))


def _gather(problem: Problem, backward: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    gathered = gatherer(problem, backward=backward)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query[..., None, :] @ gathered(key).mT * problem.head_dim**-0.5
        return (logits.softmax(-1) @ gathered(value))[..., 0, :]

    return attend


_BUILDERS = {"sdpa mask": _sdpa, "flex": _flex, "gather": _gather, DENSE: _dense}


def check(problem: Problem, expected: Tensor, method: str, output: Tensor) -> None:
    """Raises ArithmeticError unless the method's result is ours: a baseline of something else would be no baseline."""
    if method == DENSE:
        return
    worst = float((output.float() - expected.float()).abs().max())
    if not worst <= TOLERANCE[problem.dtype]:
        message = f"{method} differs from {OURS} by {worst:.2g} on {problem}"
        raise ArithmeticError(message)
