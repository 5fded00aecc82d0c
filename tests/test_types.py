# SPDX-License-Identifier: MIT
"""Annotations at run time, and what type checkers are told beside them. `make lint` checks a script of a user's."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest

import natten
from natten import _C, _dispatch, _signatures, functional, types, varlen

pytestmark = pytest.mark.cpu
MODULES = [
    "context",
    "experimental",
    "flex",
    "flops",
    "functional",
    "legacy",
    "libnatten",
    "modules",
    "types",
    "unfused",
    "utils",
    "varlen",
]


def public_functions():
    for name in ("", *MODULES):
        module = importlib.import_module(f"natten.{name}".rstrip("."))
        for attribute in getattr(module, "__all__", dir(module)):
            value = getattr(module, attribute)
            if not getattr(value, "__module__", "").startswith("natten"):
                continue
            if inspect.isclass(value):
                methods = {"__init__", "__call__", "forward"} & set(vars(value))
                yield from (getattr(value, method) for method in sorted(methods))
            elif inspect.isfunction(value):
                yield value


def named(protocol):
    """What stands for the method of a protocol, which has no function behind its overloads."""
    return SimpleNamespace(
        __module__=protocol.__module__, __qualname__=f"{protocol.__qualname__}.__call__"
    )


def test_annotations_evaluate():
    functions = set(public_functions())
    assert len(functions) > 100
    for function in functions:
        typing.get_type_hints(function)
        inspect.signature(function, eval_str=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs typing.get_overloads")
@pytest.mark.parametrize(
    ("protocol", "functions"),
    [
        (
            _signatures.Neighborhood,
            (natten.na1d, natten.na2d, natten.na3d, natten.neighborhood_attention_generic),
        ),
        (_signatures.Dense, (natten.attention,)),
        (_signatures.Varlen, (varlen.neighborhood_attention_varlen,)),
    ],
    ids=["neighborhood", "dense", "varlen"],
)
def test_overloads_have_the_functions_parameters(protocol, functions):
    """By name, annotation and default; return_lse, and what can no longer be positional behind it, aside."""
    for function in functions:
        overloads = typing.get_overloads(named(protocol))
        assert len(overloads) == 3
        expected = inspect.signature(function).parameters
        for overload in overloads:
            found = dict(inspect.signature(overload).parameters)
            found.pop("self", None)
            assert list(found) == list(expected)
            for name, parameter in found.items():
                if name != "return_lse":
                    assert parameter.annotation == expected[name].annotation, name
                    assert parameter.default == expected[name].default, name


def test_literals_are_what_is_accepted():
    assert set(typing.get_args(types.Boundary)) == set(_C.BOUNDARIES)
    backends = set(typing.get_args(types.Backend))
    plain = {*_dispatch.BACKENDS, *_dispatch._ALIASES}
    assert {name for name in backends if ":" not in name} == plain
    # A machine has the instruction sets of its own kind; GPUs' policies are the same everywhere.
    # Asked of a new process, as other tests load kernels of their own.
    program = "from natten import _dispatch; print(*_dispatch._policies().values())"
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert said
    assert set(said.split()) <= backends
    for name in backends - {"fna:aarch64", "gemm:aarch64"}:
        assert _dispatch.canonical(name)


@pytest.mark.filterwarnings("ignore:.*is an old name:DeprecationWarning")
def test_lazy_modules_are_listed():
    assert {"flex", "varlen", "types", "flops", "na2d", "__version__"} <= set(dir(natten))
    for name in dir(natten):
        assert hasattr(natten, name), name
    with pytest.raises(AttributeError, match="module 'natten' has no attribute 'nope'"):
        _ = natten.nope
    assert functional.na2d.__name__ == "na2d"
