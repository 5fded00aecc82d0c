# SPDX-License-Identifier: MIT
"""Arguments made one per axis, and checked, as callers of older releases do before they call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from natten._axes import booleans, integers
from natten._capabilities import as_device, compute_capability
from natten._errors import reject


def _integers(name: str, na_dim: int, value: Any, least: int = 1) -> tuple[int, ...]:
    values = integers(name, value, _rank(na_dim))
    if min(values) < least:
        reject(name, repr(value), f"at least {least} on every axis")
    return values


def _rank(na_dim: int) -> int:
    if na_dim not in (1, 2, 3):
        reject("na_dim", repr(na_dim), "1, 2 or 3")
    return na_dim


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """`kernel_size`, one number or one per axis, as one per axis.

    Args:
        na_dim: Number of axes.
        kernel_size: An integer of at least 1, or `na_dim` of them.

    Raises:
        ValueError: If it is neither. So do the next three.
    """
    return _integers("kernel_size", na_dim, kernel_size)


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """`stride`, one number or one per axis, as one per axis. None is 1."""
    return _integers("stride", na_dim, 1 if stride is None else stride)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """`dilation`, one number or one per axis, as one per axis. None is 1."""
    return _integers("dilation", na_dim, 1 if dilation is None else dilation)


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """The extents of a grid, one number or one per axis, as one per axis."""
    return _integers("input_size", na_dim, input_size)


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """`is_causal`, one flag or one per axis, as one per axis. None is False.

    Raises:
        ValueError: If it is neither.
    """
    return booleans("is_causal", False if is_causal is None else is_causal, _rank(na_dim))


def check_all_args(na_dim: int, kernel_size: Any, *others: Any, **named: Any) -> tuple[Any, ...]:
    """The arguments of a call, one per axis.

    Args:
        na_dim: Number of axes.
        kernel_size: See `check_kernel_size_arg`.
        *others: ``dilation, is_causal``, as until 0.17; or ``stride, dilation, is_causal``, as from 0.20 on.
        **named: The same, by name.

    Returns:
        kernel_size, stride if it was given, dilation, and is_causal: a tuple of tuples.

    Raises:
        ValueError: If an argument is wrong.

    Example:
        >>> from natten.utils import check_all_args
        >>> check_all_args(2, 7, (1, 2), False)
        ((7, 7), (1, 2), (False, False))
    """
    names: list[str] = ["dilation", "is_causal"]
    if len(others) + len(named) == 3 or "stride" in named:
        names.insert(0, "stride")
    checks = {
        "stride": check_stride_arg,
        "dilation": check_dilation_arg,
        "is_causal": check_causal_arg,
    }
    left = [name for name in names if name not in named]
    if len(left) != len(others) or not set(named) <= set(names):
        message = "check_all_args wants na_dim, kernel_size, [stride,] dilation, is_causal"
        raise TypeError(message)
    given = {**dict(zip(left, others, strict=True)), **named}
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        *(checks[name](na_dim, given[name]) for name in names),
    )


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Attention weights of a query: the number of tokens in its window."""
    return math.prod(integers("kernel_size", kernel_size, len(kernel_size)))


def make_attn_tensor_from_input(input_tensor: Tensor, num_na_weights: int) -> Tensor:
    """An uninitialised ``[batch, heads, *grid, num_na_weights]`` like ``[batch, heads, *grid, head_dim]``."""
    return input_tensor.new_empty(*input_tensor.shape[:-1], num_na_weights)


def _count_tokens(name: str, additional: Tensor | None, like: Tensor) -> int:
    if additional is None:
        return 0
    batch, heads, *_, head_dim = like.shape
    if not isinstance(additional, Tensor):
        reject(name, type(additional).__name__, "a torch.Tensor")
    got = tuple(additional.shape)
    if len(got) != 4 or got != (batch, heads, got[2], head_dim):
        reject(f"{name}.shape", got, f"[{batch}, {heads}, tokens, {head_dim}]")
    return got[2]


def check_additional_keys(query: Tensor, additional_keys: Tensor | None) -> int:
    """The number of additional keys, after a look at their shape.

    Args:
        query: ``[batch, heads, *grid, head_dim]``.
        additional_keys: ``[batch, heads, tokens, head_dim]``, or None.

    Raises:
        ValueError: If they do not fit the query.
    """
    return _count_tokens("additional_keys", additional_keys, query)


def check_additional_values(
    attn: Tensor, additional_values: Tensor | None, value: Tensor, num_na_weights: int
) -> int:
    """The number of additional values, after a look at their shape.

    Args:
        attn: ``[batch, heads, *grid, num_na_weights + tokens]``.
        additional_values: ``[batch, heads, tokens, head_dim]``, or None.
        value: ``[batch, heads, *grid, head_dim]``.
        num_na_weights: Weights of the window.

    Raises:
        ValueError: If they do not fit the value, or there are more or fewer weights.
    """
    tokens = _count_tokens("additional_values", additional_values, value)
    if attn.shape[-1] != num_na_weights + tokens:
        reject("attn.shape[-1]", attn.shape[-1], f"{num_na_weights} + {tokens} additional values")
    return tokens


def check_tiling_config(na_dim: int, tiling_config: Any) -> Any:
    """`tiling_config` if it is a pair of tile shapes, of queries and of keys.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(tiling_config, tuple) or len(tiling_config) != 2:
        reject("tiling_config", tiling_config, "the tile shapes of queries and of keys")
    return tuple(_integers("tiling_config", na_dim, shape) for shape in tiling_config)


def check_backward_tiling_config(na_dim: int, tiling_config: Any) -> Any:
    """`tiling_config` if it is two tile shapes, a number of splits per axis, and a flag.

    Raises:
        ValueError: If it is not.
    """
    if (
        not isinstance(tiling_config, tuple)
        or len(tiling_config) != 4
        or not isinstance(tiling_config[3], bool)
    ):
        wanted = "the tile shapes of queries and of keys, splits per axis, and a flag"
        reject("tiling_config", tiling_config, wanted)
    shapes = (_integers("tiling_config", na_dim, shape) for shape in tiling_config[:3])
    return (*shapes, tiling_config[3])


def get_device_cc(device: torch.device | str | int | None = None) -> int:
    """The architecture of an NVIDIA GPU: 86 for SM86; 0 if there is none."""
    index = device if device is None or isinstance(device, int) else as_device(device).index
    capability = compute_capability(index)
    return 0 if capability is None else 10 * capability[0] + capability[1]
