# SPDX-License-Identifier: MIT
"""Attention over the union of several sets of keys, from attention over each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natten._autocast import without_autocast
from natten._errors import reject


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merges attention of the same queries to several disjoint sets of keys into attention to their union.

    Differentiable, with exact gradients through outputs and LSEs; changes none of its arguments.

    Args:
        outputs: A list or tuple of one or more tensors ``[..., heads, head_dim]`` of one shape and floating point type.
        lse_tensors: The LSE of each, ``[..., heads]``: natural logarithm, as returned with ``return_lse=True``. -inf
            stands for a query without keys; such parts weigh nothing, and their outputs must be finite. What is
            lost by rounding an LSE is lost to its part's weight: 1 % where a float32 LSE is beyond 1e5.
        torch_compile: Accepted for compatibility, without effect.
        use_autograd_fix: Accepted for compatibility, without effect: gradients are right as they are.

    Returns:
        The merged output, in the type of the outputs, and the merged LSE, in the type of the LSEs.

    Raises:
        ValueError: If the parts do not fit each other.

    Example:
        >>> import natten, torch
        >>> query, key, value = torch.randn(3, 1, 8, 2, 16)
        >>> halves = [
        ...     natten.attention(query, key[:, part], value[:, part], return_lse=True)
        ...     for part in (slice(0, 4), slice(4, 8))
        ... ]
        >>> merged, lse = natten.merge_attentions(*zip(*halves))
        >>> torch.allclose(merged, natten.attention(query, key, value), atol=1e-6)
        True
    """
    _check(outputs, lse_tensors)
    return _merge(outputs, lse_tensors)


@without_autocast
def _merge(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(outputs[0].dtype, lse_tensors[0].dtype)
    lses = torch.stack([lse.to(compute) for lse in lse_tensors])
    # The result does not change with what is subtracted: no gradient needs to flow through it.
    shift = lses.detach().amax(dim=0)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = (lses - shift).exp()
    total = weights.sum(dim=0)
    # Nowhere a key: 0 and -inf, and no NaN on the way back.
    nowhere = total == 0
    total = total.masked_fill(nowhere, 1)
    merged = sum(
        (
            output.to(compute) * weight[..., None]
            for output, weight in zip(outputs, weights, strict=True)
        ),
        start=torch.zeros((), dtype=compute, device=total.device),
    )
    lse = (shift + total.log()).masked_fill(nowhere, -torch.inf)
    return (merged / total[..., None]).to(outputs[0].dtype), lse.to(lse_tensors[0].dtype)


def _check(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> None:
    for name, parts in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        if not isinstance(parts, (list, tuple)):
            remedy = "a tensor of several parts is taken as tensor.unbind(0)"
            reject(name, type(parts).__name__, "a list or tuple of tensors, one a part", remedy)
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                reject(f"{name}[{i}]", type(part).__name__, "a torch.Tensor")
            if not part.is_floating_point():
                reject(f"{name}[{i}].dtype", part.dtype, "a floating point type", "convert it")
            if part.is_nested or part.layout is not torch.strided:
                message = (
                    f"{name}[{i}] is a nested or sparse tensor; only dense tensors are implemented"
                )
                raise NotImplementedError(message)
    if len(outputs) == 0:
        reject("outputs", "empty", "at least one part")
    if len(outputs) != len(lse_tensors):
        reject("lse_tensors", f"{len(lse_tensors)} tensors", f"{len(outputs)}, one per output")
    first, first_lse = outputs[0], lse_tensors[0]
    if first.dim() < 2:
        reject("outputs[0].ndim", first.dim(), "at least 2: [..., heads, head_dim]")
    for i, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if (
            output.shape != first.shape
            or output.dtype != first.dtype
            or output.device != first.device
        ):
            reject(
                f"outputs[{i}]",
                f"{tuple(output.shape)}, {output.dtype}, {output.device}",
                f"{tuple(first.shape)}, {first.dtype}, {first.device}, as outputs[0]",
            )
        if lse.shape != first.shape[:-1]:
            reject(
                f"lse_tensors[{i}].shape",
                tuple(lse.shape),
                f"{tuple(first.shape[:-1])}, the output's without head_dim",
            )
        if lse.dtype != first_lse.dtype:
            reject(f"lse_tensors[{i}].dtype", lse.dtype, f"{first_lse.dtype}, as of the first")
        if lse.device != first.device:
            reject(f"lse_tensors[{i}].device", lse.device, f"{first.device}, as the outputs")
