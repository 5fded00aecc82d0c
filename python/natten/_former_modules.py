# SPDX-License-Identifier: MIT
"""``natten.na1d``, ``na2d`` and ``na3d`` as modules, which they were until 0.17: they held what is in `natten.modules` now.

Today functions have these names, and stay what ``natten.na2d`` is. But programs of those days import from the modules, and
pickles refer to them: for these there is an entry in `sys.modules`, where the import system looks first. A file of that name
would not do, as importing it replaces the function.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from natten import functional, modules
from natten.legacy import warn_once


class _FormerModule(ModuleType):
    def __init__(self, rank: int) -> None:
        name = f"natten.na{rank}d"
        super().__init__(
            name, f"Where releases until 0.17 keep `natten.NeighborhoodAttention{rank}D`."
        )
        self.__spec__ = ModuleSpec(name, None)
        self.__package__ = "natten"
        self.__all__ = [f"NeighborhoodAttention{rank}D"]
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        if name == f"NeighborhoodAttention{self._rank}D":
            warn_once(f"{self.__name__}.{name}", f"natten.{name}")
            return getattr(modules, name)
        if name in (f"na{self._rank}d", f"na{self._rank}d_qk", f"na{self._rank}d_av"):
            warn_once(f"{self.__name__}.{name}", f"natten.functional.{name}")
            return getattr(functional, name)
        message = f"module {self.__name__!r} has no attribute {name!r}"
        raise AttributeError(message)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


def register() -> None:
    """Makes them importable."""
    for rank in (1, 2, 3):
        module = _FormerModule(rank)
        sys.modules.setdefault(module.__name__, module)
