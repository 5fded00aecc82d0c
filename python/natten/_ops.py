# SPDX-License-Identifier: MIT
"""The ops ``natten::forward`` and ``natten::backward``: the last place that knows torch.

Schema, kernels, shapes for tracing and FLOP counts; what they are under autograd and vmap is in `_transforms`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from natten import _C, _dispatch, _launch, reference
from natten._axes import AXIS_INTS
from natten._custom_op import below_autograd, composed, count_flops, define
from natten._errors import reject
from natten._problem import Operands
from natten._signature import check, facts_of, lse_dtype

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def run(op: Any, needs_grad: bool, *arguments: Any) -> Any:
    """The op of these arguments; past autograd, where there is nothing to differentiate."""
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return composed(op, arguments)
    if (
        torch.compiler.is_compiling()
        or needs_grad
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return op(*arguments)
    # The kernel for autograd costs 10 us.
    return below_autograd(op, arguments)


# Kernels ------------------------------------------------------------------------------------------------------------

_ABSENT: _C.Tensor = (0, 0, (0,), 0)
_WORKSPACE_ALIGNMENT = 256  # bytes (natten/cuda/library.hpp)


def _ref(tensor: Tensor) -> _C.Tensor:
    stride = tensor.stride()
    return tensor.data_ptr(), stride[0], stride[1:-2], stride[-2]


def _readable(tensor: Tensor) -> tuple[Tensor, _C.Tensor]:
    """`tensor` with a contiguous last dim, which is all that the core asks for, and where that is."""
    stride = tensor.stride()
    if stride[-1] != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
        stride = tensor.stride()
    return tensor, (tensor.data_ptr(), stride[0], stride[1:-2], stride[-2])


def _row_ref(tensor: Tensor) -> _C.Tensor:
    """Of a tensor without head_dim, as LSE is."""
    stride = tensor.stride()
    return tensor.data_ptr(), stride[0], stride[1:-1], stride[-1]


def check_backward(
    operands: Operands,
    axes: tuple[int, ...],
    scale: float,
    backend: str,
    tile_shapes: tuple[int, ...],
) -> None:
    """Raises, if the backward kernel does not take these tile shapes, before it is too late to see by whom."""
    if not torch.compiler.is_compiling() and backend != "reference":
        launch("backward", backend, operands, axes, scale, tile_shapes)


def launch(
    op: str,
    backend: str,
    tensors: tuple[Tensor | None, ...],
    axes: tuple[int, ...],
    scale: float = 1.0,
    tile_shapes: Sequence[int] = (),
    heads_kv: int | None = None,
) -> _launch.Launch:
    """What runs `op` of these tensors, on the device where they are; raises if they are not what the op takes."""
    like = tensors[0]
    assert like is not None
    arch, allow_tf32 = 0, False
    if not like.is_cpu:
        arch = _dispatch.arch_of(like.device) or 0
        allow_tf32 = like.dtype == torch.float32 and _dispatch.allows_tf32(op)
    return _launch.launch(
        op,
        backend,
        _dispatch.forced_isa(),
        axes,
        heads_kv,
        scale,
        arch,
        allow_tf32,
        tuple(tile_shapes),
        *facts_of(tensors),
    )


def _run(run: Any, query: Tensor, workspace_bytes: int, *arguments: Any) -> None:
    """Calls the core, for CUDA tensors on their device's current stream, with memory from torch's allocator."""
    address = 0
    if workspace_bytes > 0:
        workspace = query.new_empty(workspace_bytes + _WORKSPACE_ALIGNMENT, dtype=torch.uint8)
        address = -(-workspace.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    if query.is_cpu:  # only CUDA kernels in emulation have a workspace
        run(*arguments, torch.get_num_threads(), 0, 0, address)
        return
    with torch.cuda.device(query.device):
        stream = torch.cuda.current_stream().cuda_stream
        run(*arguments, 1, _dispatch.arch_of(query.device), stream, address)


def _resolve(backend: str, query: Tensor | None) -> str:
    if query is None:
        reject("the first tensor of the op", None, "a tensor")
    if backend == _dispatch.IN_FORCE:
        backend = _dispatch.backend_in_force()
    if backend == "reference":
        return backend
    if backend != "flex" and (query.is_cpu or _dispatch.arch_of(query.device) is not None):
        return backend
    message = f"the op cannot run backend {backend!r} on {query.device.type}"
    raise NotImplementedError(message)


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Sizes one by one: torch parses them in half the time that it takes for a tuple.
    *grid, _ = query.shape
    return (
        query.new_empty(*grid, value.shape[-1]),
        query.new_empty(*grid, dtype=lse_dtype(query.dtype)),
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
    tile_shapes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    backend = _resolve(backend, query)
    operands = (query, key, value, additional_keys, additional_values, rpb)
    flat_axes = tuple(axes)
    if backend == "reference":
        check("forward", operands, flat_axes)
        # Copies, as an op's results must be no views of others.
        output, lse = reference.forward(Operands(*operands), flat_axes, scale)
        return output.clone(), lse.clone()
    problem, kernel, workspace_bytes = launch(
        "forward", backend, operands, flat_axes, scale, tile_shapes or ()
    )
    output, lse = _empty_output(query, value)
    if kernel is None:
        return output.zero_(), lse.fill_(-math.inf)
    query, query_ref = _readable(query)
    key, key_ref = _readable(key)
    value, value_ref = _readable(value)
    more_keys = more_values = _ABSENT
    if (
        additional_keys is not None
        and additional_values is not None
        and additional_keys.shape[1] > 0
    ):
        additional_keys, more_keys = _readable(additional_keys)
        additional_values, more_values = _readable(additional_values)
    if rpb is not None:
        rpb = rpb.to(lse.dtype).contiguous()
    _run(
        _C.forward,
        query,
        workspace_bytes,
        problem,
        kernel,
        query_ref,
        key_ref,
        value_ref,
        more_keys,
        more_values,
        0 if rpb is None else rpb.data_ptr(),
        _ref(output),
        _row_ref(lse),
    )
    return output, lse


def _empty_gradients(operands: Operands) -> Gradients:
    # An op returns tensors only: no numbers stand for "no gradient".
    query, key, value, additional_keys, additional_values, rpb = operands
    absent = query.new_empty(0)

    def like(tensor: Tensor | None) -> Tensor:
        return absent.clone() if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(query),
        like(key),
        like(value),
        like(additional_keys),
        like(additional_values),
        like(rpb),
    )


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    d_lse: Tensor | None,
    axes: list[int],
    scale: float,
    backend: str,
    tile_shapes: Sequence[int] | None = None,
) -> Gradients:
    backend = _resolve(backend, query)
    operands = Operands(query, key, value, additional_keys, additional_values, rpb)
    tensors = (*operands, output, lse, d_output, d_lse)
    flat_axes = tuple(axes)
    if backend == "reference":
        check("backward", tensors, flat_axes)
        gradients = _empty_gradients(operands)
        computed = reference.backward(operands, d_output, d_lse, flat_axes, scale)
        for gradient, result in zip(gradients, computed, strict=True):
            if result is not None:
                gradient.copy_(result)
        return gradients
    problem, kernel, workspace_bytes = launch(
        "backward", backend, tensors, flat_axes, scale, tile_shapes or ()
    )
    gradients = _empty_gradients(operands)
    if kernel is None:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    d_query, d_key, d_value, d_additional_keys, d_additional_values, d_rpb = gradients
    query, query_ref = _readable(query)
    key, key_ref = _readable(key)
    value, value_ref = _readable(value)
    output, output_ref = _readable(output)
    d_output, d_output_ref = _readable(d_output)
    more_keys = more_values = d_more_keys = d_more_values = _ABSENT
    if (
        additional_keys is not None
        and additional_values is not None
        and additional_keys.shape[1] > 0
    ):
        additional_keys, more_keys = _readable(additional_keys)
        additional_values, more_values = _readable(additional_values)
        d_more_keys, d_more_values = _ref(d_additional_keys), _ref(d_additional_values)
    kernel_rpb, kernel_d_rpb = rpb, d_rpb
    if rpb is not None:
        kernel_rpb = rpb.to(lse.dtype).contiguous()
        kernel_d_rpb = d_rpb if d_rpb.dtype == lse.dtype else torch.empty_like(kernel_rpb)
    _run(
        _C.backward,
        query,
        workspace_bytes,
        problem,
        kernel,
        query_ref,
        key_ref,
        value_ref,
        more_keys,
        more_values,
        0 if kernel_rpb is None else kernel_rpb.data_ptr(),
        output_ref,
        _row_ref(lse),
        d_output_ref,
        _ABSENT if d_lse is None else _row_ref(d_lse),
        _ref(d_query),
        _ref(d_key),
        _ref(d_value),
        d_more_keys,
        d_more_values,
        0 if rpb is None else kernel_d_rpb.data_ptr(),
    )
    if kernel_d_rpb is not d_rpb:
        d_rpb.copy_(kernel_d_rpb)
    return gradients


# Shapes -------------------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    operands, axes = arguments[:6], arguments[6]
    check("forward", operands, axes)
    return _empty_output(operands[0], operands[2])


def _backward_fake(*arguments: Any) -> Gradients:
    tensors, axes = arguments[:10], arguments[10]
    check("backward", tensors, axes)
    return _empty_gradients(Operands(*tensors[:6]))


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb"
# No default but None: ahead of time, torch compiles any into one.
_SETTINGS = "SymInt[] axes, float scale, str backend, int[]? tile_shapes=None"
_GRADIENTS = ", ".join(["Tensor"] * 6)
FORWARD: Any = define(
    f"forward({_OPERANDS}, {_SETTINGS}) -> (Tensor output, Tensor lse)", _forward, _forward_fake
)
BACKWARD: Any = define(
    f"backward({_OPERANDS}, Tensor output, Tensor lse, Tensor d_output, Tensor? d_lse, {_SETTINGS}) -> ({_GRADIENTS})",
    _backward,
    _backward_fake,
)


# FLOP counts --------------------------------------------------------------------------------------------------------


def attended_pairs(axes: tuple[int, ...], queries: int, additional_keys: int) -> int:
    """(query, key) pairs of one head of one sample."""
    per_axis = (axes[i : i + AXIS_INTS] for i in range(0, len(axes), AXIS_INTS))
    return math.prod(map(_C.attended_pairs, per_axis)) + queries * additional_keys


def _flops(
    q_shape: Any,
    v_shape: Any,
    extra_shape: Any,
    axes: Any,
    query_products: int,
    value_products: int,
) -> int:
    batch, *grid, heads, head_dim = q_shape
    additional = 0 if extra_shape is None else extra_shape[1]
    pairs = attended_pairs(tuple(axes), math.prod(grid), additional)
    return 2 * batch * heads * pairs * (query_products * head_dim + value_products * v_shape[-1])  # type: ignore[no-any-return]


def _forward_flops(*shapes: Any) -> int:
    query, _, value, additional_keys, _, _, axes, *_ = shapes
    return _flops(query, value, additional_keys, axes, 1, 1)


def _backward_flops(*shapes: Any) -> int:
    query, _, value, additional_keys, _, _, _, _, _, _, axes, *_ = shapes
    return _flops(query, value, additional_keys, axes, 3, 2)


count_flops(FORWARD, _forward_flops)
count_flops(BACKWARD, _backward_flops)
