# SPDX-License-Identifier: MIT
"""Every public name of the package and how it is called, a line each: what `tests/test_public_api.py` compares.

``python tests/list_public_api.py > tests/public_api.txt`` after a change that users are meant to see.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import natten


def modules() -> list[types.ModuleType]:
    """The package and every module of it whose path has no underscore."""
    found = [natten]
    for info in pkgutil.walk_packages(natten.__path__, "natten."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            # Not the attribute of the parent: a function may have the same name.
            importlib.import_module(info.name)
            found.append(sys.modules[info.name])
    return found


def public_names(module: types.ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or else what is defined in it."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def _call(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    # Without annotations, which may become more precise.
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def _members(name: str, value: type) -> Iterator[str]:
    yield f"class {name}{_call(value)}"
    for member, attribute in sorted(vars(value).items()):
        if member.startswith("_"):
            continue
        function = getattr(attribute, "__func__", attribute)
        yield f"  {member}{_call(function) if callable(function) else ''}"


def lines() -> Iterator[str]:
    """The list."""
    for module in modules():
        yield f"[{module.__name__}]"
        for name in public_names(module):
            value = getattr(module, name)
            if isinstance(value, type):
                yield from _members(name, value)
            elif callable(value):
                yield f"{name}{_call(value)}"
            else:
                yield f"{name}: {type(value).__name__}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write("\n".join(lines()) + "\n")
