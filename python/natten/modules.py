# SPDX-License-Identifier: MIT
"""Neighborhood attention as modules: projections, attention, projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from natten import _attend, _dispatch, _signatures
from natten._axes import (
    BoolPerAxis,
    BoundaryPerAxis,
    IntPerAxis,
    boolean,
    integer,
    normalize_windows,
    number,
    per_axis,
)
from natten._errors import reject
from natten._problem import DTYPES, AvOperands, QkOperands
from natten._settings import NattenContext
from natten.functional import neighborhood_attention_generic
from natten.types import Backend


class _NeighborhoodAttention(nn.Module):
    rank: int

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: IntPerAxis | None = None,
        stride: IntPerAxis | None = 1,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        qkv_bias: bool = True,
        qk_scale: float | Tensor | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        embed_dim: int | None = None,
        bias: bool | None = None,
        boundary: BoundaryPerAxis = "shift",
        offset: IntPerAxis = 0,
        backend: Backend | None = None,
        use_experimental_ops: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = _one_of("dim", dim, "embed_dim", embed_dim)
        num_heads = _positive("num_heads", num_heads)
        if dim % num_heads != 0:
            reject("dim", dim, f"a multiple of {num_heads}, num_heads")
        if kernel_size is None:
            reject("kernel_size", None, "an integer, or one per axis")
        has_rpb = boolean("rel_pos_bias", rel_pos_bias)
        if bias is not None:
            has_rpb = boolean("bias", bias)
        if backend is not None:
            _dispatch.canonical(backend)
        if dtype is not None and dtype not in DTYPES:
            reject("dtype", dtype, f"one of {', '.join(map(str, DTYPES))}")

        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else _scale(qk_scale)
        self._set_window(kernel_size, stride, dilation, is_causal, boundary, offset)
        self.backend = backend
        self.attn_drop_rate = _probability("attn_drop", attn_drop)
        self.attn_drop = nn.Dropout(self.attn_drop_rate)

        self.qkv = nn.Linear(
            dim, 3 * dim, bias=boolean("qkv_bias", qkv_bias), device=device, dtype=dtype
        )
        self.rpb: nn.Parameter | None
        if has_rpb:
            if any(size < 1 for size in self.kernel_size):
                reject(
                    "kernel_size", kernel_size, "at least 1 on every axis with rel_pos_bias=True"
                )
            entries = (2 * size - 1 for size in self.kernel_size)
            self.rpb = nn.Parameter(torch.zeros(num_heads, *entries, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(_probability("proj_drop", proj_drop))

    def _set_window(
        self,
        kernel_size: IntPerAxis,
        stride: IntPerAxis | None = 1,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        boundary: BoundaryPerAxis = "shift",
        offset: IntPerAxis = 0,
    ) -> None:
        """Keeps what is said about windows, checked, as one value per axis."""
        windows = normalize_windows(
            self.rank, kernel_size, stride, dilation, is_causal, boundary, offset
        )
        self.kernel_size = tuple(window.kernel_size for window in windows)
        self.stride = tuple(window.stride for window in windows)
        self.dilation = tuple(window.dilation for window in windows)
        self.is_causal = tuple(window.is_causal for window in windows)
        self.boundary = per_axis("boundary", boundary, self.rank)
        self.offset = tuple(window.offset for window in windows)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes pickled modules of all releases: what one did not know has the value that it computed with."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        names = ("stride", "dilation", "is_causal", "boundary", "offset")
        self._set_window(
            state["kernel_size"], **{name: state[name] for name in names if name in state}
        )
        if "rpb" not in self._parameters:
            self.register_parameter("rpb", None)
        if "attn_drop" not in self._modules:
            self.attn_drop = nn.Dropout(0.0)
        self.attn_drop_rate = state.get("attn_drop_rate", getattr(self.attn_drop, "p", 0.0))
        self.backend = state.get("backend")

    @overload
    def forward(self, x: Tensor, return_weights: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, return_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, x: Tensor, return_weights: bool) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attends: fused, unless something needs the attention weights in memory.

        That is dropout of them in training, `return_weights`, the backend ``"gemm"``, which has unfused kernels only, or
        `natten.use_fused_na` with False.

        Args:
            x: ``[batch, *grid, dim]``.
            return_weights: Whether to return the attention weights, too.

        Returns:
            A tensor of the same shape (with boundary "valid", of a smaller grid). With return_weights, a tuple of it and
            of the weights after softmax and dropout, ``[batch, heads, *grid, prod(kernel_size)]``, laid out as
            `natten.functional.na2d_qk` does.

        Raises:
            ValueError: If `x` has the wrong shape, or is too small for the window.
            NotImplementedError: If the backend cannot run the problem, or is fused and the weights are needed.
        """
        query, key, value = self._project(x)
        drops = self.training and self.attn_drop_rate > 0
        weights: Tensor | None = None
        if drops or return_weights or not _prefers_fused(self.backend):
            attended, weights = self._unfused(query, key, value)
        else:
            attended = self._fused(query, key, value)
        projected: Tensor = self.proj_drop(self.proj(attended.flatten(-2)))
        if not return_weights:
            return projected
        assert weights is not None
        return projected, weights

    if TYPE_CHECKING:
        __call__: _signatures.Forward  # torch's own returns Any

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, ``[batch, *grid, heads, head_dim]``. Whatever is in place of the linear layer will do."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            reject(f"{name}: x", type(x).__name__, "a torch.Tensor")
        if x.dim() != self.rank + 2:
            reject(f"{name}: x.ndim", x.dim(), f"{self.rank + 2}: [batch, *grid, channels]")
        if not x.is_floating_point():
            reject(f"{name}: x.dtype", x.dtype, "a floating point type", "convert it")
        channels = getattr(self.qkv, "in_features", None)
        if channels is not None and x.shape[-1] != channels:
            is_first = x.shape[1] == channels
            hint = "channels come last: pass x.movedim(1, -1)" if is_first else ""
            reject(f"{name}: x.shape[-1]", x.shape[-1], f"{channels}", hint)
        projected = self.qkv(x)
        shape = (*x.shape[:-1], 3 * self.num_heads * self.head_dim)
        if projected.shape != shape:
            reject(
                f"{name}: qkv(x).shape",
                tuple(projected.shape),
                f"{tuple(shape)}: queries, keys and values of all heads",
            )
        # Not by unflatten, which torch.compile cannot trace under torch.set_default_device.
        split = projected.reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        return split.unbind(-3)  # type: ignore[no-any-return]

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return neighborhood_attention_generic(
            query,
            key,
            value,
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.scale,
            backend=self.backend,
            rpb=self.rpb,
            boundary=self.boundary,
            offset=self.offset,
        )

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        window = (
            self.kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.boundary,
            self.offset,
        )
        query = _attend.scaled(query, self.scale)
        query, key, value = (tensor.movedim(-2, 1) for tensor in (query, key, value))
        logits = _attend.qk(self.rank, self.backend, QkOperands(query, key, rpb=self.rpb), *window)
        weights = self.attn_drop(logits.softmax(-1))
        attended = _attend.av(self.rank, self.backend, AvOperands(weights, value), *window)
        return attended.movedim(1, -2), weights

    def extra_repr(self) -> str:
        """What is printed between the module's parentheses."""
        parts: dict[str, Any] = {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "boundary": self.boundary,
            "offset": self.offset,
            "qk_scale": self.scale,
            "rel_pos_bias": self.rpb is not None,
            "backend": self.backend,
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items())


def _prefers_fused(backend: Backend | None) -> bool:
    """Whether attention that can be fused is to be: what has only one kind of kernels is stronger than the switch."""
    name = _dispatch.backend_in_force() if backend is None else _dispatch.canonical(backend)
    name = name.partition(":")[0]  # without the policy
    return name in ("fna", "flex") or (name != "gemm" and NattenContext.is_fused_na_enabled)


def _positive(name: str, value: int | None) -> int:
    found = integer(name, value)
    if found < 1:
        reject(name, value, "at least 1")
    return found


def _scale(value: Any) -> Any:
    """Tensors are left to the call, which may differentiate them."""
    return value if isinstance(value, Tensor) else number("qk_scale", value)


def _probability(name: str, value: float) -> float:
    found = number(name, value)
    if not 0 <= found <= 1:
        reject(name, value, "a probability, 0 to 1")
    return found


def _one_of(name: str, value: int | None, other: str, other_value: int | None) -> int:
    if value is not None and other_value is not None:
        reject(other, other_value, f"nothing, as {name} is given", "they mean the same")
    return _positive(f"{name} (or {other})", value if other_value is None else other_value)


_DOC = """Neighborhood attention on {what}, with projections.

    Checkpoints of both generations of the package load: the keys are ``qkv.*``, ``proj.*`` and, with a bias, ``rpb``.
    Beyond kernel_size, pass arguments by keyword: the generations order them differently. This is the newer one's
    order; what only the older one has is keyword-only.

    Args:
        dim: Channels of input and output; a multiple of num_heads. ``embed_dim`` means the same.
        num_heads: Number of heads.
        kernel_size: Tokens in the window, one number or one per axis.
        stride: That many consecutive queries share a window, per axis.
        dilation: Distance between the tokens of a window, per axis. None means 1.
        is_causal: Whether queries attend to no later token, per axis.
        qkv_bias: Whether the projection to query, key and value has a bias.
        qk_scale: Factor of the logits: a number, or a parameter, of one or of ``[num_heads]``. None means
            ``head_dim ** -0.5``.
        proj_drop: Dropout of the output.
        rel_pos_bias: Whether to learn a bias per head and relative position. ``bias`` means the same.
        attn_drop: Dropout of attention weights. In training, what is not 0.0 needs the weights in memory, and so the
            slower unfused kernels.
        embed_dim: See dim.
        bias: See rel_pos_bias.
        boundary: What happens at the ends of an axis, see `natten.functional.neighborhood_attention_generic`.
        offset: See there.
        backend: See there.
        use_experimental_ops: Accepted for compatibility, without effect.
        device: Where to make the parameters; None: on torch's default device.
        dtype: Of the parameters: float64, float32, bfloat16 or float16; None: torch's default.

    Raises:
        ValueError: If an argument is wrong: here, unless that depends on the input.

    Example:
        >>> import natten, torch
        >>> module = natten.NeighborhoodAttention{rank}D(dim=64, num_heads=4, kernel_size=3)
        >>> module(torch.randn({shape}, 64)).shape
        torch.Size([{shape}, 64])
    """


class NeighborhoodAttention1D(_NeighborhoodAttention):  # noqa: D101
    __doc__ = _DOC.format(what="a sequence: input ``[batch, length, dim]``", rank=1, shape="2, 16")
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):  # noqa: D101
    __doc__ = _DOC.format(
        what="a feature map: input ``[batch, height, width, dim]``", rank=2, shape="2, 8, 8"
    )
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):  # noqa: D101
    __doc__ = _DOC.format(
        what="a volume: input ``[batch, depth, height, width, dim]``", rank=3, shape="2, 4, 8, 8"
    )
    rank = 3
