# SPDX-License-Identifier: MIT
"""Where autocast ends: what computes in plain torch computes in the types of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def without_autocast(function: _F) -> _F:
    """`function` with autocast off inside, for the device of its first argument: a tensor, or several.

    Operands have the type that autocast wants before an op sees them. Inside, it would round the float32 of every
    product to it once more.
    """

    @functools.wraps(function)
    def inner(*arguments: Any, **settings: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments, **settings)
        first = arguments[0]
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.amp.is_autocast_available(device_type):
            return function(*arguments, **settings)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments, **settings)

    return cast("_F", inner)
