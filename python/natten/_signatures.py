# SPDX-License-Identifier: MIT
"""What type checkers are told of functions that return one tensor or, with ``return_lse=True``, two.

Each class has the parameters of the functions that it is for, which tests/test_types.py compares. At run time the functions
are what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, overload

from torch import Tensor

from natten._axes import BoolPerAxis, BoundaryPerAxis, IntPerAxis
from natten.types import Backend

if TYPE_CHECKING:
    from natten.varlen import Metadata


class Neighborhood(Protocol):
    """`natten.functional.na2d`, the other ranks, and `neighborhood_attention_generic`."""

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntPerAxis,
        stride: IntPerAxis | None = 1,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: Backend | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: Literal[False] = False,
        *,
        rpb: Tensor | None = None,
        boundary: BoundaryPerAxis = "shift",
        offset: IntPerAxis = 0,
        grid: IntPerAxis | None = None,
        query_origin: IntPerAxis | None = None,
        key_origin: IntPerAxis | None = None,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntPerAxis,
        stride: IntPerAxis | None = 1,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: Backend | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: Literal[True],
        rpb: Tensor | None = None,
        boundary: BoundaryPerAxis = "shift",
        offset: IntPerAxis = 0,
        grid: IntPerAxis | None = None,
        query_origin: IntPerAxis | None = None,
        key_origin: IntPerAxis | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntPerAxis,
        stride: IntPerAxis | None = 1,
        dilation: IntPerAxis | None = 1,
        is_causal: BoolPerAxis | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: Backend | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: bool,
        rpb: Tensor | None = None,
        boundary: BoundaryPerAxis = "shift",
        offset: IntPerAxis = 0,
        grid: IntPerAxis | None = None,
        query_origin: IntPerAxis | None = None,
        key_origin: IntPerAxis | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class Dense(Protocol):
    """`natten.functional.attention`."""

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        seqlens_Q: Tensor | None = None,
        seqlens_KV: Tensor | None = None,
        cumulative_seqlen_Q: Tensor | None = None,
        cumulative_seqlen_KV: Tensor | None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: Backend | None = None,
        q_tile_size: Any = None,
        kv_tile_size: Any = None,
        backward_q_tile_size: Any = None,
        backward_kv_tile_size: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        seqlens_Q: Tensor | None = None,
        seqlens_KV: Tensor | None = None,
        cumulative_seqlen_Q: Tensor | None = None,
        cumulative_seqlen_KV: Tensor | None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: Backend | None = None,
        q_tile_size: Any = None,
        kv_tile_size: Any = None,
        backward_q_tile_size: Any = None,
        backward_kv_tile_size: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        scale: float | Tensor | None = None,
        seqlens_Q: Tensor | None = None,
        seqlens_KV: Tensor | None = None,
        cumulative_seqlen_Q: Tensor | None = None,
        cumulative_seqlen_KV: Tensor | None = None,
        max_seqlen_Q: int | None = None,
        max_seqlen_KV: int | None = None,
        backend: Backend | None = None,
        q_tile_size: Any = None,
        kv_tile_size: Any = None,
        backward_q_tile_size: Any = None,
        backward_kv_tile_size: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        *,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class Varlen(Protocol):
    """`natten.varlen.neighborhood_attention_varlen`."""

    @overload
    def __call__(
        self,
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
        return_lse: Literal[False] = False,
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
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
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
        *,
        return_lse: Literal[True],
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
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
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
        *,
        return_lse: bool,
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
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class Forward(Protocol):
    """A module, called as its ``forward``."""

    @overload
    def __call__(self, x: Tensor, return_weights: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, x: Tensor, return_weights: Literal[True]) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(self, x: Tensor, return_weights: bool) -> Tensor | tuple[Tensor, Tensor]: ...


def neighborhood(function: Callable[..., Any]) -> Neighborhood:
    """Marks a function as a `Neighborhood`."""
    return cast(Neighborhood, function)


def dense(function: Callable[..., Any]) -> Dense:
    """Marks a function as a `Dense`."""
    return cast(Dense, function)


def varlen(function: Callable[..., Any]) -> Varlen:
    """Marks a function as a `Varlen`."""
    return cast(Varlen, function)
