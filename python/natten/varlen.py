# SPDX-License-Identifier: MIT
"""Neighborhood attention of several grids of different extents, packed one behind the other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten import _attend, _dispatch, _signatures
from natten._axes import (
    BoolPerAxis,
    BoundaryPerAxis,
    IntPerAxis,
    Window,
    integers,
    normalize_windows,
    per_axis,
)
from natten._errors import ArgumentError, reject
from natten._problem import Operands
from natten._varlen import check_packed
from natten.types import Backend

__all__ = ["Layout", "configure_varlen", "neighborhood_attention_varlen"]


class Layout(NamedTuple):
    """One of the grids.

    Attributes:
        extents: Tokens per axis.
        kernel_size: Tokens in its windows.
        stride: How many consecutive queries share a window.
        dilation: Distance between the tokens of a window.
    """

    extents: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


class Metadata(NamedTuple):
    """What `configure_varlen` returns: the grids, and what they have in common."""

    layouts: tuple[Layout, ...]
    is_causal: tuple[bool, ...]
    boundary: tuple[str, ...]
    offset: tuple[int, ...]
    backend: Backend | None


def configure_varlen(
    token_layout_list: Sequence[tuple[int, ...]],
    head_dim: int | None = None,
    device: Any = None,
    dtype: Any = None,
    requires_grad: bool = False,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    backend: Backend | None = None,
    *,
    head_dim_v: int | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
) -> Metadata:
    """What `neighborhood_attention_varlen` takes as ``metadata``, made once for many calls.

    Args:
        token_layout_list: The extents of each grid; all of the same rank.
        head_dim: Accepted for compatibility, without effect, as are the next three, head_dim_v, and what has to do with
            tiles or schedules: that depends on the grid here.
        device: See head_dim.
        dtype: See head_dim.
        requires_grad: See head_dim.
        kernel_size: Tokens in the window, for grids that kernel_size_list says nothing about.
        stride: How many consecutive queries share a window, likewise.
        dilation: Distance between the tokens of a window, likewise.
        is_causal: Whether queries attend to no later token, per axis; the same for all grids.
        kernel_size_list: One kernel size per grid.
        stride_list: One stride per grid.
        dilation_list: One dilation per grid.
        backend: Name of a backend; None: that of `use_backend`.
        head_dim_v: See head_dim.
        q_tile_shape: See head_dim.
        kv_tile_shape: See head_dim.
        backward_q_tile_shape: See head_dim.
        backward_kv_tile_shape: See head_dim.
        run_persistent_kernel: See head_dim.
        kernel_schedule: See head_dim.
        boundary: What happens at the ends of an axis, see `natten.functional.neighborhood_attention_generic`; the same
            for all grids, as is the offset.
        offset: See there.

    Returns:
        The grids, for any number of calls.

    Raises:
        ValueError: If there is no grid, lists are of different lengths, or an argument is wrong; of which grid is said.
    """
    layouts = _layouts(token_layout_list)
    if backend is not None:
        _dispatch.canonical(backend)

    rank, count = len(layouts[0]), len(layouts)
    sizes = (
        _each("kernel_size", kernel_size, kernel_size_list, count),
        _each("stride", stride, stride_list, count),
        _each("dilation", dilation, dilation_list, count),
    )
    found: list[Layout] = []
    windows: tuple[Window, ...] = ()
    for i, (extents, k, s, d) in enumerate(zip(layouts, *sizes, strict=True)):
        with _of_grid(i, extents):
            windows = normalize_windows(rank, k, s, d, is_causal, boundary, offset)
        fields = (tuple(getattr(w, name) for w in windows) for name in Layout._fields[1:])
        found.append(Layout(extents, *fields))
    return Metadata(
        tuple(found),
        tuple(window.is_causal for window in windows),
        per_axis("boundary", boundary, rank),
        tuple(window.offset for window in windows),
        backend,
    )


def _each(name: str, one: Any, many: Any, count: int) -> Sequence[Any]:
    """What is said of each of `count` grids: by a list, or for all of them."""
    if many is None:
        return [one] * count
    if not isinstance(many, (list, tuple)) or len(many) != count:
        reject(f"{name}_list", many, f"a list of {count}, one {name} per grid")
    return many


def _layouts(token_layout_list: Any) -> list[tuple[int, ...]]:
    """The extents of the grids, checked."""
    name = "token_layout_list"
    if not isinstance(token_layout_list, (list, tuple)) or not token_layout_list:
        reject(name, token_layout_list, "the extents of at least one grid: a list of tuples")
    layouts: list[tuple[int, ...]] = []
    for i, extents in enumerate(token_layout_list):
        if not isinstance(extents, (list, tuple)) or not 1 <= len(extents) <= 3:
            reject(f"{name}[{i}]", extents, "a tuple of 1 to 3 extents")
        if layouts and len(extents) != len(layouts[0]):
            wanted = f"{len(layouts[0])} extents, as {name}[0]: all grids of the same rank"
            reject(f"{name}[{i}]", extents, wanted)
        layouts.append(integers(f"{name}[{i}]", extents, len(extents)))
        if min(layouts[-1]) < 0:
            reject(f"{name}[{i}]", extents, "extents of at least 0")
    return layouts


@contextmanager
def _of_grid(i: int, extents: tuple[int, ...]) -> Iterator[None]:
    """Lets errors say which grid they are of."""
    try:
        yield
    except (ArgumentError, NotImplementedError) as error:
        message = f"in grid {i} of token_layout_list, {extents}: {error}"
        raise type(error)(message) from error


@_signatures.varlen
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: Metadata | None = None,
    token_layout_list: Sequence[tuple[int, ...]] | None = None,
    kernel_size: IntPerAxis = 2,
    stride: IntPerAxis | None = 1,
    dilation: IntPerAxis | None = 1,
    is_causal: BoolPerAxis | None = False,
    kernel_size_list: Sequence[IntPerAxis] | None = None,
    stride_list: Sequence[IntPerAxis] | None = None,
    dilation_list: Sequence[IntPerAxis] | None = None,
    scale: float | Tensor | None = None,
    backend: Backend | None = None,
    return_lse: bool = False,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    rpb: Tensor | None = None,
    boundary: BoundaryPerAxis = "shift",
    offset: IntPerAxis = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention within each of several grids. One call of the kernels per grid.

    Args:
        query: ``[1, tokens, heads, head_dim]``: the tokens of all grids, the first grid's first, each in row-major order.
        key: ``[1, tokens, heads_kv, head_dim]``.
        value: ``[1, tokens, heads_kv, head_dim_value]``.
        metadata: What `configure_varlen` returns. It says the grids and their windows, and nothing else may say them
            otherwise.
        token_layout_list: The extents of each grid.
        kernel_size: As of `configure_varlen`, as are the next six, boundary and offset.
        stride: See there.
        dilation: See there.
        is_causal: See there.
        kernel_size_list: See there.
        stride_list: See there.
        dilation_list: See there.
        scale: Factor of the logits. None means ``head_dim ** -0.5``. A tensor, of one number or ``[heads]``, has a
            gradient: it multiplies the query, which is rounded to its type once more.
        backend: Name of a backend; None: that of the metadata, or of `use_backend`.
        return_lse: Whether to return the LSE, too.
        additional_keys: ``[1, tokens, heads_kv, head_dim]``, attended by every query of every grid.
        additional_values: ``[1, tokens, heads_kv, head_dim_value]``.
        attention_kwargs: Accepted for compatibility, without effect, as is what has to do with tiles, splits, schedules
            or compilation: that depends on the grid here.
        q_tile_shape: See attention_kwargs.
        kv_tile_shape: See attention_kwargs.
        backward_q_tile_shape: See attention_kwargs.
        backward_kv_tile_shape: See attention_kwargs.
        backward_kv_splits: See attention_kwargs.
        backward_use_pt_reduction: See attention_kwargs.
        run_persistent_kernel: See attention_kwargs.
        kernel_schedule: See attention_kwargs.
        torch_compile: See attention_kwargs.
        rpb: Relative positional bias ``[heads, *(2 * kernel_size - 1)]``, of all grids, whose kernel size is the same then.
        boundary: As of `configure_varlen`. With ``"valid"``, the output has the tokens only whose windows are whole.
        offset: See there.

    Returns:
        The output ``[1, tokens, heads, head_dim_value]``; with return_lse, a tuple of it and the LSE
        ``[1, tokens, heads]``.

    Raises:
        ValueError: If an argument is wrong, of which grid is said, or if the grids do not hold all tokens.
        NotImplementedError: If the backend cannot run a grid's problem.

    Example:
        >>> import torch
        >>> from natten.varlen import neighborhood_attention_varlen
        >>> x = torch.randn(1, 4 * 5 + 6 * 3, 2, 8)
        >>> neighborhood_attention_varlen(x, x, x, token_layout_list=[(4, 5), (6, 3)], kernel_size=3).shape
        torch.Size([1, 38, 2, 8])
    """
    windows: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
        "kernel_size_list": kernel_size_list,
        "stride_list": stride_list,
        "dilation_list": dilation_list,
        "boundary": boundary,
        "offset": offset,
    }
    if metadata is None:
        metadata = configure_varlen(token_layout_list, backend=backend, **windows)  # type: ignore[arg-type]  # None is rejected
    else:
        _check_agreement(metadata, token_layout_list, windows)
    counts = [math.prod(layout.extents) for layout in metadata.layouts]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_packed(name, tensor)
        if tensor.shape[1] != sum(counts):
            reject(f"{name}.shape[1]", tensor.shape[1], f"{sum(counts)}, the tokens of all grids")
    outputs, lses = [], []
    parts = (torch.split(tensor, counts, dim=1) for tensor in (query, key, value))
    for i, (layout, *tensors) in enumerate(zip(metadata.layouts, *parts, strict=True)):
        q, k, v = (tensor.unflatten(1, layout.extents) for tensor in tensors)
        with _of_grid(i, layout.extents):
            output, lse = _attend.neighborhood(
                len(layout.extents),
                metadata.backend if backend is None else backend,
                Operands(q, k, v, additional_keys, additional_values, rpb),
                *layout[1:],
                metadata.is_causal,
                metadata.boundary,
                metadata.offset,
                None,
                None,
                None,
                scale,
            )
        outputs.append(output.flatten(1, -3))
        lses.append(lse.flatten(1, -2))
    if return_lse:
        return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)
    return torch.cat(outputs, dim=1)


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(neighborhood_attention_varlen).parameters.items()
}


def _check_agreement(metadata: Any, token_layout_list: Any, windows: dict[str, Any]) -> None:
    """Checks that what is said beside the metadata is what it says, too."""
    if not isinstance(metadata, Metadata):
        reject("metadata", type(metadata).__name__, "what configure_varlen returns")
    layouts = metadata.layouts
    rank = len(layouts[0].extents)
    for name, value in {"token_layout_list": token_layout_list, **windows}.items():
        if value is None or value is _DEFAULTS[name]:
            continue
        field = name.removesuffix("_list")
        known: Any
        said: Any
        if name == "token_layout_list":
            known, said = [layout.extents for layout in layouts], _layouts(value)
        elif field in Layout._fields:
            known = [getattr(layout, field) for layout in layouts]
            said = _each(field, value, None if name == field else value, len(layouts))
            said = [per_axis(name, one, rank) for one in said]
        else:
            known, said = getattr(metadata, field), per_axis(name, value, rank)
        if said != known:
            reject(name, value, f"{known}, as metadata has it", "say it to configure_varlen only")
