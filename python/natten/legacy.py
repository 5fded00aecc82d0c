# SPDX-License-Identifier: MIT
"""Functions under the names, and with the arguments, that they had from release 0.14 to 0.17.

All tensors are heads first, logits are not scaled, and what is computed is what `natten.functional.na2d_qk` and
`na2d_av` compute. Each name warns once of its successor.

The order of the numbers behind the tensors changed over time, and a call is understood by how many there are:

- one, in 1-D and 2-D: the dilation (until 0.14.4, of ``*av`` until 0.14.5). The kernel size is that of the bias table, or
  the one that the number of attention weights belongs to. No release took a kernel size alone.
- two: kernel size and dilation.
- four, in 3-D: those of the first axis and of the two others: ``kernel_size_d, kernel_size, dilation_d, dilation``.

Numbers given by name count by their names. Where a release took one number, a tuple with one per axis is taken too;
a dilation of None is 1.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from natten import _attend
from natten._axes import BoolPerAxis, IntPerAxis
from natten._errors import reject
from natten._problem import Operands
from natten.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "na1d_qk_with_bias",
    "na2d_qk_with_bias",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]

_QK = (na1d_qk, na2d_qk, na3d_qk)
_AV = (na1d_av, na2d_av, na3d_av)


@lru_cache
def warn_once(name: str, successor: str, stacklevel: int = 1) -> None:
    """Warns once of an old name; by default, whoever used it called the caller of this function."""
    message = f"{name} is an old name: use {successor} (said once)"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 2)


def _deprecated(name: str, successor: str, stacklevel: int = 2) -> None:
    """Warns once of a function; by default, its caller is the caller of this function's caller."""
    if not torch.compiler.is_compiling():
        warn_once(f"natten.functional.{name}", f"natten.functional.{successor}", stacklevel)


_ONE = ("dilation",)
_TWO = ("kernel_size", "dilation")
_FOUR = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")


def _sizes(
    function: str, rank: int, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[IntPerAxis | None, IntPerAxis]:
    """Kernel size (None: not given) and dilation, of the numbers behind the tensors."""
    layouts = (_TWO, _FOUR) if rank == 3 else (_ONE, _TWO)
    count = len(given) + len(named)
    for layout in layouts:
        left = [name for name in layout if name not in named]
        if len(layout) == count and len(left) == len(given):
            sizes = dict(zip(left, given, strict=True), **named)
            break
    else:
        forms = " or ".join(f"({', '.join(layout)})" for layout in layouts)
        got = [*map(repr, given), *(f"{name}={value!r}" for name, value in named.items())]
        reject(f"{function}: arguments behind the tensors", f"({', '.join(got)})", forms)
    if layout is _FOUR:
        kernel_size = (sizes["kernel_size_d"], *2 * (sizes["kernel_size"],))
        dilation = (sizes["dilation_d"], *2 * (sizes["dilation"],))
        return kernel_size, dilation
    dilation = sizes["dilation"]
    return sizes.get("kernel_size"), 1 if dilation is None else dilation


def _split(given: tuple[Any, ...], additional: Tensor | None) -> tuple[tuple[Any, ...], Any]:
    """The numbers, and the additional tokens that may follow them: then there are 3 or 5 arguments."""
    return (given[:-1], given[-1]) if len(given) in (3, 5) else (given, additional)


def _of_bias(function: str, rpb: Tensor | None) -> IntPerAxis:
    """The kernel size that a bias table [heads, *(2 * kernel_size - 1)] is for."""
    if rpb is None:
        reject(
            f"{function}: kernel_size",
            "not given",
            "a kernel size, as there is no bias table to tell it",
            "pass kernel_size and dilation",
        )
    if not isinstance(rpb, Tensor):
        reject(f"{function}: rpb", type(rpb).__name__, "a torch.Tensor, or None")
    return tuple((entries + 1) // 2 for entries in rpb.shape[1:])


def _of_weights(function: str, rank: int, attn: Tensor) -> IntPerAxis:
    """The kernel size, the same on all axes, that so many attention weights belong to."""
    if not isinstance(attn, Tensor) or attn.dim() == 0:
        reject(f"{function}: attn", attn, "a torch.Tensor [batch, heads, *grid, prod(kernel_size)]")
    slots = attn.shape[-1]
    kernel_size = round(float(slots ** (1 / rank)))
    if kernel_size**rank != slots:
        reject(
            f"{function}: attn.shape[-1]",
            slots,
            f"the {'square' if rank == 2 else 'cube'} of a kernel size",
            "pass kernel_size and dilation",
        )
    return kernel_size


def _qkrpb(
    rank: int,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> Tensor:
    name = f"natten{rank}dqkrpb"
    _deprecated(name, f"na{rank}d_qk(query, key, kernel_size, dilation, rpb=rpb)", stacklevel=3)
    kernel_size, dilation = _sizes(name, rank, given, named)
    if kernel_size is None:
        kernel_size = _of_bias(name, rpb)
    return _QK[rank - 1](query, key, kernel_size, dilation, rpb=rpb)


def _qk(
    rank: int, query: Tensor, key: Tensor, given: tuple[Any, ...], named: dict[str, Any]
) -> Tensor:
    name = f"natten{rank}dqk"
    _deprecated(name, f"na{rank}d_qk(query, key, kernel_size, dilation)", stacklevel=3)
    kernel_size, dilation = _sizes(name, rank, given, named)
    if kernel_size is None:
        kernel_size = _of_bias(name, None)
    return _QK[rank - 1](query, key, kernel_size, dilation)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    given: tuple[Any, ...],
    additional_values: Tensor | None,
    named: dict[str, Any],
) -> Tensor:
    name = f"natten{rank}dav"
    _deprecated(name, f"na{rank}d_av(attn, value, kernel_size, dilation)", stacklevel=3)
    given, additional_values = _split(given, additional_values)
    kernel_size, dilation = _sizes(name, rank, given, named)
    if kernel_size is None:
        kernel_size = _of_weights(name, rank, attn)
    return _AV[rank - 1](attn, value, kernel_size, dilation, additional_values)


def natten1dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, *sizes: IntPerAxis | None, **named: Any
) -> Tensor:
    """Attention weights with a bias on a sequence: `natten.functional.na1d_qk`.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: The same.
        rpb: ``[heads, 2 * kernel_size - 1]``, or None.
        *sizes: ``dilation``, or ``kernel_size, dilation``.
        **named: The same, by name.

    Returns:
        ``[batch, heads, length, kernel_size]``.

    Raises:
        ValueError: If there are other arguments, or the kernel size cannot be told.

    Example:
        >>> import torch, warnings
        >>> from natten.functional import natten1dqkrpb
        >>> warnings.simplefilter("ignore", DeprecationWarning)
        >>> query = key = torch.randn(1, 2, 16, 8)
        >>> natten1dqkrpb(query, key, torch.zeros(2, 9), 2).shape
        torch.Size([1, 2, 16, 5])
        >>> natten1dqkrpb(query, key, None, 3, 2).shape
        torch.Size([1, 2, 16, 3])
    """
    return _qkrpb(1, query, key, rpb, sizes, named)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, *sizes: IntPerAxis | None, **named: Any
) -> Tensor:
    """Attention weights with a bias on a feature map: `natten.functional.na2d_qk`. As `natten1dqkrpb`."""
    return _qkrpb(2, query, key, rpb, sizes, named)


def natten3dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, *sizes: IntPerAxis | None, **named: Any
) -> Tensor:
    """Attention weights with a bias on a volume: `natten.functional.na3d_qk`.

    Takes two numbers or four: ``kernel_size_d, kernel_size, dilation_d, dilation``.
    """
    return _qkrpb(3, query, key, rpb, sizes, named)


def natten1dqk(query: Tensor, key: Tensor, *sizes: IntPerAxis | None, **named: Any) -> Tensor:
    """Attention weights on a sequence: `natten.functional.na1d_qk`. Takes ``kernel_size, dilation``."""
    return _qk(1, query, key, sizes, named)


def natten2dqk(query: Tensor, key: Tensor, *sizes: IntPerAxis | None, **named: Any) -> Tensor:
    """Attention weights on a feature map: `natten.functional.na2d_qk`. Takes ``kernel_size, dilation``."""
    return _qk(2, query, key, sizes, named)


def natten3dqk(query: Tensor, key: Tensor, *sizes: IntPerAxis | None, **named: Any) -> Tensor:
    """Attention weights on a volume: `natten.functional.na3d_qk`. Numbers as of `natten3dqkrpb`."""
    return _qk(3, query, key, sizes, named)


def natten1dav(
    attn: Tensor,
    value: Tensor,
    *sizes: IntPerAxis | Tensor | None,
    additional_values: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """Values, weighted, on a sequence: `natten.functional.na1d_av`.

    Args:
        attn: ``[batch, heads, length, kernel_size]``.
        value: ``[batch, heads, length, head_dim]``.
        *sizes: ``dilation``, or ``kernel_size, dilation``, which additional values may follow.
        additional_values: ``[batch, heads, tokens, head_dim]``, for further columns of `attn`.
        **named: The numbers, by name.

    Returns:
        A tensor like `value`.

    Raises:
        ValueError: If there are other arguments, or the kernel size cannot be told.
    """
    return _av(1, attn, value, sizes, additional_values, named)


def natten2dav(
    attn: Tensor,
    value: Tensor,
    *sizes: IntPerAxis | Tensor | None,
    additional_values: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """Values, weighted, on a feature map: `natten.functional.na2d_av`. As `natten1dav`."""
    return _av(2, attn, value, sizes, additional_values, named)


def natten3dav(
    attn: Tensor,
    value: Tensor,
    *sizes: IntPerAxis | Tensor | None,
    additional_values: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """Values, weighted, on a volume: `natten.functional.na3d_av`. Numbers as of `natten3dqkrpb`."""
    return _av(3, attn, value, sizes, additional_values, named)


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Attention weights with a bias on a sequence: `natten.functional.na1d_qk` with ``rpb=bias``."""
    _deprecated("na1d_qk_with_bias", "na1d_qk(query, key, kernel_size, dilation, rpb=bias)")
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Attention weights with a bias on a feature map: `natten.functional.na2d_qk` with ``rpb=bias``."""
    _deprecated("na2d_qk_with_bias", "na2d_qk(query, key, kernel_size, dilation, rpb=bias)")
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    *sizes: IntPerAxis | Tensor | None,
    additional_keys: Tensor | None = None,
    **named: Any,
) -> Tensor:
    """Attention weights with a bias on a volume: `natten.functional.na3d_qk` with ``rpb=bias``.

    Numbers as of `natten3dqkrpb`; additional keys may follow them.
    """
    name = "na3d_qk_with_bias"
    _deprecated(name, "na3d_qk(query, key, kernel_size, dilation, rpb=bias)")
    sizes, additional_keys = _split(sizes, additional_keys)
    kernel_size, dilation = _sizes(name, 3, sizes, named)
    assert kernel_size is not None
    return na3d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def fused(
    rank: int,
    backend: str | None,
    operands: Operands,
    kernel_size: IntPerAxis,
    dilation: IntPerAxis | None,
    is_causal: BoolPerAxis | None,
    scale: float | None,
) -> Tensor:
    """Fused attention by the arguments that it had in 0.17."""
    return _attend.neighborhood(
        rank,
        backend,
        operands,
        kernel_size,
        1,
        dilation,
        is_causal,
        "shift",
        0,
        None,
        None,
        None,
        scale,
    )[0]


class _Fused:
    """The class that 0.17 runs its fused kernels by, for callers who apply it themselves."""

    rank: int

    @classmethod
    def apply(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        kernel_size: IntPerAxis,
        dilation: IntPerAxis,
        is_causal: BoolPerAxis,
        scale: float | None,
        tiling_config_forward: Any = None,
        tiling_config_backward: Any = None,
    ) -> Tensor:
        """Fused attention, heads last.

        Args:
            query: ``[batch, *grid, heads, head_dim]``.
            key: The same.
            value: The same.
            rpb: Relative positional bias, or None.
            kernel_size: Tokens in the window, per axis.
            dilation: Their distance, per axis.
            is_causal: Whether queries attend to no later token, per axis.
            scale: Factor of the logits.
            tiling_config_forward: Without effect: tile shapes of another package's kernels.
            tiling_config_backward: Without effect.

        Returns:
            A tensor like `value`.
        """
        _deprecated(f"FusedNeighborhoodAttention{cls.rank}D.apply", f"na{cls.rank}d")
        operands = Operands(query, key, value, None, None, rpb)
        return fused(cls.rank, None, operands, kernel_size, dilation, is_causal, scale)


class FusedNeighborhoodAttention1D(_Fused):
    """``FusedNeighborhoodAttention1D.apply``: see `natten.functional.na1d`."""

    rank = 1


class FusedNeighborhoodAttention2D(_Fused):
    """``FusedNeighborhoodAttention2D.apply``: see `natten.functional.na2d`."""

    rank = 2


class FusedNeighborhoodAttention3D(_Fused):
    """``FusedNeighborhoodAttention3D.apply``: see `natten.functional.na3d`."""

    rank = 3
