# SPDX-License-Identifier: MIT
"""What the tensors of each op are. The ops are public: whatever runs or traces one of them asks here first.

Past this place only addresses and strides are left, and a tensor of another shape, type or device is memory that is
read as what it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from natten._axes import AXIS_INTS, Axis
from natten._errors import reject
from natten._problem import DTYPES


class _Info(NamedTuple):
    """What is checked of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


# Tensors that a call may do without; in place of others, the dispatcher lets None pass.
_OPTIONAL = ("additional_keys", "additional_values", "rpb", "d_lse")
# The dims of every tensor, in the order in which the op takes them. Those with a star are one an axis.
_Dims: TypeAlias = "tuple[str, ...]"
_OPERANDS: dict[str, _Dims] = {
    "query": ("batch", "*queries", "heads", "head_dim"),
    "key": ("batch", "*keys", "heads_kv", "head_dim"),
    "value": ("batch", "*keys", "heads_kv", "head_dim_value"),
    "additional_keys": ("batch", "additional_keys", "heads_kv", "head_dim"),
    "additional_values": ("batch", "additional_keys", "heads_kv", "head_dim_value"),
    "rpb": ("heads", "*entries"),
}
_OUTPUT = ("batch", "*queries", "heads", "head_dim_value")
_LSE = ("batch", "*queries", "heads")
_QUERY = ("batch", "heads", "*queries", "head_dim")
_KEY = ("batch", "heads_kv", "*keys", "head_dim")
_WEIGHTS = ("batch", "heads", "*queries", "slots")
_SIGNATURES: dict[str, dict[str, _Dims]] = {
    "forward": _OPERANDS,
    "backward": {**_OPERANDS, "output": _OUTPUT, "lse": _LSE, "d_output": _OUTPUT, "d_lse": _LSE},
    "qk": {"query": _QUERY, "key": _KEY, "rpb": _OPERANDS["rpb"]},
    "av": {"weights": _WEIGHTS, "value": _KEY},
    "av_transposed": {"weights": _WEIGHTS, "x": _QUERY},
    "rpb_gradient": {"weights": _WEIGHTS},
}


class Sizes(NamedTuple):
    """What the tensors say beside the axes, in the order in which the core takes it."""

    dtype: torch.dtype
    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_value: int
    additional_keys: int
    has_rpb: bool


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of LSE and of the bias table, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def axes_of(flat_axes: Sequence[int]) -> list[Axis]:
    """The axes that an op's integers mean. What they must be to each other, the core checks."""
    rank, rest = divmod(len(flat_axes), AXIS_INTS)
    if rest or not 1 <= rank <= 3:
        wanted = f"{AXIS_INTS} for each of 1 to 3 axes"
        reject("axes", f"{len(flat_axes)} integers", wanted)
    # Symbolic ones would be guarded by each comparison; they come from real tensors, whose sizes are no such numbers.
    numbers = [number for number in flat_axes if isinstance(number, int)]
    if not all(-(2**31) <= number < 2**31 for number in numbers):
        reject("axes", list(flat_axes), "integers of 32 bits")
    axes = [Axis(*flat_axes[i : i + AXIS_INTS]) for i in range(0, len(flat_axes), AXIS_INTS)]
    sizes = (size for axis in axes for size in (axis.query_extent, axis.key_extent))
    if any(isinstance(size, int) and size < 0 for size in sizes):
        reject("axes", list(flat_axes), "extents of the boxes that are not negative")
    return axes


def facts_of(tensors: Iterable[Tensor | None]) -> list[Any]:
    """All of the tensors that is checked, as part of a cache key: flat, which halves the time to make and to compare it."""
    facts: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
        else:
            facts += tensor.shape, tensor.dtype, tensor.device, tensor.layout
    return facts


def infos_of(facts: Sequence[Any]) -> list[_Info | None]:
    """What `facts_of` says, tensor by tensor."""
    infos: list[_Info | None] = []
    rest = iter(facts)
    for shape in rest:
        infos.append(None if shape is None else _Info(shape, next(rest), next(rest), next(rest)))
    return infos


def check(
    op: str, tensors: Sequence[Tensor | None], flat_axes: Sequence[int], **known: int
) -> None:
    """Raises an `ArgumentError` if the tensors do not fit each other and the axes."""
    check_infos(op, infos_of(facts_of(tensors)), axes_of(flat_axes), **known)


def check_infos(
    op: str, infos: Sequence[_Info | None], axes: Sequence[Axis], **known: int
) -> Sizes:
    """The sizes of an op's tensors, if they fit each other and the axes.

    `infos` may end early: a backward pass is planned before there are gradients. `known` are dims that no tensor has.

    Raises:
        ArgumentError: If a tensor does not fit.
    """
    first: Any = infos[0]
    given = dict(zip(_SIGNATURES[op], infos, strict=False))
    if (given.get("additional_keys") is None) != (given.get("additional_values") is None):
        reject("additional_keys, additional_values", "one of them", "both, or none")
    per_axis: dict[str, list[int]] = {
        "*queries": [axis.query_extent for axis in axes],
        "*keys": [axis.key_extent for axis in axes],
        "*entries": [2 * axis.kernel_size - 1 for axis in axes],
    }
    numbers = {"slots": math.prod([axis.kernel_size for axis in axes]), **known}
    for name, info in given.items():
        if first is None or (info is None and name not in _OPTIONAL):
            reject(name, None, "a tensor")
        if info is not None:
            _check_type(name, info, first)
            _check_shape(name, info.shape, _SIGNATURES[op][name], per_axis, numbers)
    heads = numbers["heads"]
    heads_kv = numbers.get("heads_kv", heads)
    head_dim = numbers.get("head_dim", 1)
    head_dim_value = numbers.get("head_dim_value", head_dim)
    if heads < 1 or heads_kv < 1 or heads % heads_kv != 0:
        reject("heads, heads_kv", (heads, heads_kv), "at least 1, and a multiple of the second")
    if head_dim < 1 or head_dim_value < 1:
        reject("head_dim, head_dim_value", (head_dim, head_dim_value), "at least 1")
    return Sizes(
        first.dtype,
        numbers["batch"],
        heads,
        heads_kv,
        head_dim,
        head_dim_value,
        numbers.get("additional_keys", 0),
        given.get("rpb") is not None,
    )


def _check_type(name: str, info: _Info, first: _Info) -> None:
    _, dtype, device, layout = info
    _, like, where, _ = first
    if layout is not torch.strided:
        reject(f"{name}.layout", layout, f"{torch.strided}", "convert it")
    if device != where:
        reject(f"{name}.device", device, f"{where}, as of all other tensors", "move it")
    if like not in DTYPES:
        reject(f"{name}.dtype", like, f"one of {', '.join(map(str, DTYPES))}", "convert it")
    if name == "rpb":
        if not dtype.is_floating_point:
            reject("rpb.dtype", dtype, "a floating point type", "convert it")
        return
    wanted = lse_dtype(like) if name.endswith("lse") else like
    if dtype != wanted:
        reject(f"{name}.dtype", dtype, f"{wanted}, where the first tensor has {like}", "convert it")


def _check_shape(
    name: str,
    shape: Sequence[int],
    dims: _Dims,
    per_axis: dict[str, list[int]],
    numbers: dict[str, int],
) -> None:
    """Checks the dims whose numbers are known, and learns those of the others."""
    wanted: list[Any] = []
    of_grid: list[bool] = []
    for dim in dims:
        sizes = per_axis[dim] if dim in per_axis else [numbers.get(dim, dim)]
        wanted += sizes
        of_grid += [dim in ("*queries", "*keys")] * len(sizes)
    fits, remedy = len(shape) == len(wanted), ""
    for size, dim, is_of_grid in zip(shape, wanted, of_grid, strict=False):
        if isinstance(dim, str):
            numbers[dim] = size
        elif size != dim:
            fits = False
            if is_of_grid:
                remedy = "a graph of torch.jit.trace has the grid it was traced with, one of torch.export any"
    if not fits:
        sizes_wanted, meaning = ", ".join(map(str, wanted)), ", ".join(dims)
        reject(f"{name}.shape", tuple(shape), f"({sizes_wanted}), which is [{meaning}]", remedy)
