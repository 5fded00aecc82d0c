# SPDX-License-Identifier: MIT
"""What the kernels can run on a device. Never makes a CUDA context."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TypeAlias

import torch

from natten import _C, _dispatch
from natten._axes import Axis
from natten._errors import ArgumentError

Device: TypeAlias = "torch.device | str | int | None"

# Attributes of a device in the CUDA driver's API.
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@lru_cache
def _driver_capability(index: int) -> tuple[int, int] | None:
    """The compute capability of a visible device by the CUDA driver, which needs no context for that."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(value.value)
    return capability[0], capability[1]


def compute_capability(index: int | None = None) -> tuple[int, int] | None:
    """(8, 6) of an NVIDIA GPU, by default of the current one; None if there is none."""
    if torch.version.cuda is None:
        return None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.get_device_capability(index)
    return _driver_capability(0 if index is None else index)


def as_device(device: object) -> torch.device:
    """The device that is meant by its name."""
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError) as error:
        wanted = "a device such as 'cpu' or 'cuda:0', or the index of a GPU"
        message = f"device = {device!r}; wanted {wanted}"
        raise ArgumentError(message) from error


def _arch(device: Device) -> int | None:
    """The architecture of a device: 86 for SM86, 0 for a CPU; None for a GPU that is not there."""
    if device is None:
        capability = compute_capability()
        return 0 if capability is None else 10 * capability[0] + capability[1]
    if not isinstance(device, int) or isinstance(device, bool):
        device = as_device(device)
        if device.type == "cpu":
            return 0
        if device.type != "cuda":
            return None
        capability = compute_capability(device.index)
    else:
        capability = compute_capability(device)
    return None if capability is None else 10 * capability[0] + capability[1]


def _runs(
    device: Device, op: str, backend: str, dtypes: tuple[str, ...], tf32: bool = False
) -> bool:
    """Whether a kernel runs a small problem in one of `dtypes`; with `tf32`, one that uses TF32."""
    arch = _arch(device)
    isa = _dispatch.forced_isa()
    if arch is None or (arch == 0 and _dispatch.isa_obstacle("cpu", isa)):
        return False
    axis = Axis(extent=8, kernel_size=3, query_extent=8, key_extent=8)
    for dtype in dtypes:
        problem = _C.Problem(dtype, axis, 1, 1, 1, 64, 64, 0, False, 1.0, tf32)
        rows = _C.candidates(problem, op, backend, isa, arch)
        if any(not reasons and (kernel.is_tf32 or not tf32) for kernel, reasons in rows):
            return True
    return False


def has_cuda() -> bool:
    """Whether there are CUDA kernels, and an NVIDIA GPU to run them."""
    return compute_capability() is not None and _dispatch.has_code_for(None)


def has_fna(device: Device = None) -> bool:
    """Whether fused kernels run on a device. True on CPUs.

    Args:
        device: A device or the index of a GPU, as for all these queries; None: the current GPU, and the CPU if there
            is none.
    """
    return _runs(device, "forward", "fna", ("float32", "float16"))


def has_gemm(device: Device = None) -> bool:
    """Whether the unfused kernels of backend "gemm" run on a device. True on CPUs."""
    return _runs(device, "qk", "gemm", ("float32", "float16"))


def has_half(device: Device = None) -> bool:
    """Whether kernels for float16 run on a device. True on CPUs."""
    return _runs(device, "forward", "auto", ("float16",))


def has_bfloat(device: Device = None) -> bool:
    """Whether kernels for bfloat16 run on a device. True on CPUs."""
    return _runs(device, "forward", "auto", ("bfloat16",))


def has_fp32_gemm(device: Device = None) -> bool:
    """Whether the unfused kernels of backend "gemm" compute float32 on a device, by whatever means. True on CPUs."""
    return _runs(device, "qk", "gemm", ("float32",))


def has_tf32_gemm(device: Device = None) -> bool:
    """Whether they can round its factors to TF32 there. False on CPUs."""
    return _runs(device, "qk", "gemm", ("float32",), tf32=True)


def has_fp64_gemm(device: Device = None) -> bool:
    """Whether they compute float64 there; "naive" always does."""
    return _runs(device, "qk", "gemm", ("float64",))


has_fused_na = has_fna
