# SPDX-License-Identifier: MIT
"""Neighborhood attention for PyTorch."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch as _torch  # noqa: F401  # first: the core runs on torch's threads

try:
    from natten import _C
except ImportError as error:
    message = (
        "the compiled core of natten cannot be imported. In a source tree, install the package first "
        "(`pip install .`) and do not run Python from inside `python/`; otherwise reinstall it, as its wheel was "
        f"built for another Python or platform. The reason was: {error}"
    )
    raise ImportError(message) from error

from natten import (
    _former_modules,
    _transforms,  # noqa: F401  # what the ops are under autograd and vmap
    context,
)
from natten._dispatch import load_kernels, use_backend
from natten._errors import ArgumentError
from natten.context import *  # switches and queries, whose names are listed there
from natten.functional import (
    attention,
    explain,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)
from natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = [
    "HAS_LIBNATTEN",
    "ArgumentError",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "attention",
    "explain",
    "load_kernels",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
    "use_backend",
]
__all__ += context.__all__

# Here, and not in the metadata of the distribution, which frozen programs and vendored copies do not have.
__version__ = "0.30.0"
# There is no natten without its core.
HAS_LIBNATTEN = True

os.register_at_fork(
    before=_C.before_fork,
    after_in_parent=_C.after_fork_in_parent,
    after_in_child=_C.after_fork_in_child,
)

# Parts that few callers need, imported when they are asked for.
_LAZY = (
    "experimental",
    "flex",
    "flops",
    "libnatten",
    "natten1d",
    "natten2d",
    "natten3d",
    "types",
    "utils",
    "varlen",
)

if TYPE_CHECKING:
    # By name: type checkers take a __getattr__ for a promise of every name.
    from natten import experimental as experimental
    from natten import flex as flex
    from natten import flops as flops
    from natten import libnatten as libnatten
    from natten import natten1d as natten1d
    from natten import natten2d as natten2d
    from natten import natten3d as natten3d
    from natten import types as types
    from natten import utils as utils
    from natten import varlen as varlen
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            return importlib.import_module(f"natten.{name}")
        message = f"module 'natten' has no attribute {name!r}"
        raise AttributeError(message)


_former_modules.register()


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
