# SPDX-License-Identifier: MIT
"""Bounds of packed sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from natten._varlen import packed_bounds


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None,
    seqlens_KV: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What `natten.attention` takes as ``cumulative_seqlen_*`` and ``max_seqlen_*``, of the lengths of sequences.

    Args:
        query: ``[1, length, heads, head_dim]``: sequences one behind the other.
        key: ``[1, length_kv, heads_kv, head_dim]``.
        value: ``[1, length_kv, heads_kv, head_dim_value]``.
        seqlens_Q: int32 ``[sequences]``, or None for one sequence.
        seqlens_KV: int32 ``[sequences]``, or None if seqlens_Q is None.

    Returns:
        int32 ``[sequences + 1]`` of queries and of keys (None, None if there are no lengths), and the longest lengths
        of both (0, 0).

    Raises:
        ValueError: If the lengths do not fit the tensors or each other.

    Example:
        >>> import torch
        >>> from natten.utils.varlen import generate_varlen_parameters
        >>> x, lengths = torch.randn(1, 5, 2, 8), torch.tensor([2, 3], dtype=torch.int32)
        >>> generate_varlen_parameters(x, x, x, lengths, lengths)[0].tolist()
        [0, 2, 5]
    """
    found = packed_bounds(query, key, value, seqlens_Q, seqlens_KV, None, None)
    if found is None:
        return None, None, 0, 0
    cumulative = [torch.tensor(ends, dtype=torch.int32, device=query.device) for ends in found]
    longest = [max(b - a for a, b in pairwise(ends)) for ends in found]
    return cumulative[0], cumulative[1], longest[0], longest[1]
