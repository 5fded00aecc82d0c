# SPDX-License-Identifier: MIT
"""The semantics by brute force, dense attention under such a mask, and comparisons that raise.

Written from the definition of a window and not from the package: it shares nothing with what it checks.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from tests.cases import Problem


def window(extent, kernel_size, stride, dilation, is_causal, boundary, offset, token):
    """Tokens that `token` attends to on one axis of the whole grid, and how many the softmax counts."""
    group, position = token % dilation, token // dilation
    length = math.ceil((extent - group) / dilation)
    run = math.floor((position - offset) / stride) * stride + offset
    leader = run + (stride - 1 if is_causal else stride // 2)
    if boundary == "shift":
        leader = min(leader, length - 1)
    begin = leader - kernel_size + 1 if is_causal else leader - kernel_size // 2
    end = position + 1 if is_causal else begin + kernel_size
    counted = end - begin
    if boundary == "shift" and not is_causal:
        begin = max(0, min(begin, length - kernel_size))
        end = begin + kernel_size
    tokens = [key * dilation + group for key in range(begin, end) if 0 <= key < length]
    return tokens, counted if boundary == "zeros" else len(tokens)


def is_query(extent, kernel_size, dilation, boundary, token):
    """Whether a token is a query: for "valid", only where the whole window lies in the grid."""
    if boundary != "valid":
        return True
    first = token - (kernel_size // 2) * dilation
    return first >= 0 and first + (kernel_size - 1) * dilation < extent


def axis_mask(problem: Problem, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """[query, key] whether it attends, [query, key] index into the bias table, [query] counted keys of one axis."""
    extent, kernel_size, dilation = problem.grid[i], problem.kernel_size[i], problem.dilation[i]
    query_origin, query_extent = problem.query_box[i]
    key_origin, key_extent = problem.key_box[i]
    boundary = problem.boundary[i]
    queries = [
        token
        for token in range(query_origin, query_origin + query_extent)
        if is_query(extent, kernel_size, dilation, boundary, token)
    ]
    # Number by number: on the CPU, wherever the tensors are.
    attends = torch.zeros(len(queries), key_extent, dtype=torch.bool, device="cpu")
    bias = torch.zeros(len(queries), key_extent, dtype=torch.int64, device="cpu")
    counted = torch.zeros(len(queries), dtype=torch.int64, device="cpu")
    for row, query in enumerate(queries):
        tokens, counted[row] = window(
            extent,
            kernel_size,
            problem.stride[i],
            dilation,
            problem.is_causal[i],
            boundary,
            problem.offset[i],
            query,
        )
        for token in tokens:
            assert key_origin <= token < key_origin + key_extent, "the case's key box is too small"
            attends[row, token - key_origin] = True
            bias[row, token - key_origin] = token // dilation - query // dilation + kernel_size - 1
    return attends, bias, counted


@functools.lru_cache(maxsize=512)
def mask(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """[query, key] whether it attends, [query, key] index into the flat bias table, [query] missing keys."""
    attends = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    bias = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    counted = torch.ones(1, dtype=torch.int64, device="cpu")
    for i, kernel_size in enumerate(problem.kernel_size):
        along, entries, counts = axis_mask(problem, i)
        attends = (attends[:, None, :, None] & along[:, None]).flatten(2).flatten(0, 1)
        bias = bias[:, None, :, None] * (2 * kernel_size - 1) + entries[:, None]
        bias = bias.flatten(2).flatten(0, 1)
        counted = (counted[:, None] * counts).flatten()
    return attends, bias.where(attends, 0), (counted - attends.sum(1)).double()


def dense(
    problem: Problem,
    operands,
    dtype: torch.dtype | None = None,
    logits_of: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under the brute-force mask, every step in `dtype`, but for logits rounded to `logits_of`. Differentiable."""
    attends, bias, missing = (table.to(operands[0].device) for table in mask(problem))
    query, key, value, more_keys, more_values, rpb = (
        None if t is None else t.to(dtype or operands[0].dtype) for t in operands
    )
    rank = len(problem.grid)
    for dim, extent in enumerate(problem.output_grid):
        if query.shape[1 + dim] != extent:
            query = query.narrow(1 + dim, problem.first_query(dim), extent)
    grid = query.shape[:-1]
    query = query.flatten(1, rank)
    key, value = key.flatten(1, rank), value.flatten(1, rank)
    count = 0
    if more_keys is not None:
        count = more_keys.shape[1]
        key, value = torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1)
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * problem.scale_value
    attends = torch.cat([attends, attends.new_ones(len(attends), count)], 1)
    if rpb is not None:
        table = rpb.flatten(1)[:, bias]
        logits = logits + torch.nn.functional.pad(table, (0, count))
    if logits_of is not None:
        logits = logits + (logits.to(logits_of).to(logits) - logits).detach()
    logits = logits.masked_fill(~attends, -math.inf)
    # The missing keys of "zeros", as one more column: logit 0, but as often as keys are missing.
    extra = missing.to(logits.dtype).log().expand(*logits.shape[:2], -1)[..., None]
    logits = torch.cat([logits, extra], -1)
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    exponentials = (logits - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    alone = total == 0
    total = total.masked_fill(alone, 1)
    weights = (exponentials / total)[..., :-1]
    output = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    lse = (top + total.log()).masked_fill(alone, -math.inf)[..., 0].transpose(1, 2)
    return output.reshape(*grid, value.shape[-1]), lse.reshape(grid)


def run(function, operands, seed=0, with_lse=True):
    """Output, LSE and the gradient of each operand (None where there is none), for random cotangents."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in operands]
    output, lse = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t)
        for t in (output, lse)
    ]
    # A row without keys has LSE -inf, which nobody can differentiate.
    cotangents[1] = cotangents[1].masked_fill(lse.detach() == -math.inf, 0)
    loss_of = [output, lse] if with_lse else [output]
    present = [t for t in inputs if t is not None]
    gradients = iter(torch.autograd.grad(loss_of, present, cotangents[: len(loss_of)]))
    found = [None if t is None else next(gradients) for t in inputs]
    return [output.detach(), lse.detach(), *found]


NAMES = (
    "output",
    "lse",
    "d_query",
    "d_key",
    "d_value",
    "d_additional_keys",
    "d_additional_values",
    "d_rpb",
)
# How many times the type's epsilon, of the largest number, an error may always be: the rounding of inputs and outputs,
# where the dense computation has been lucky.
FLOOR = {torch.float64: 512, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """Raises, with the worst place, if a number is off by more than `tolerance`, or not finite where it should be."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(finite, (actual - expected).abs(), torch.where(same, 0.0, math.inf))
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.flatten()[worst] <= tolerance, (
        f"{what}{list(index)} = {actual[index]:.9g}, expected {expected[index]:.9g}; off by {error[index]:.3g}, "
        f"tolerance {tolerance:.3g}; {int((error > tolerance).sum())} of {error.numel()} are off"
    )


def assert_as_good_as_dense(results, expected, dense_results, dtype: torch.dtype) -> None:
    """Each result within twice the error of the dense computation in the same type, `dtype`, plus a floor."""
    for name, result, exact, lossy in zip(NAMES, results, expected, dense_results, strict=True):
        assert (result is None) == (exact is None), name
        if exact is None:
            continue
        finite = exact.isfinite()
        largest = exact[finite].abs().max().item() if finite.any() else 0.0
        off = (lossy.double() - exact.double())[finite].abs()
        lost = off.max().item() if off.numel() else 0.0
        floor = FLOOR[dtype] * torch.finfo(dtype).eps * largest
        assert_close(result, exact, 2 * lost + floor + 1e-30, name)
