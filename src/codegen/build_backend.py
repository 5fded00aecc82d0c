"""The build backend of the package: scikit-build-core's, which also asks for CUTLASS where CUDA kernels are built.

What a build needs is installed before it begins, by pip, uv or whoever builds, and the build itself downloads nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from gpus import find_native

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

REQUIREMENT = Path(__file__).resolve().parents[2] / "third_party" / "cutlass" / "requirement.txt"
Settings: TypeAlias = "dict[str, list[str] | str] | None"


def definition(name: str, config_settings: Settings) -> str:
    """The value that CMake will be given for a variable, by whichever of scikit-build-core's ways; empty: none."""
    said = [f"{key}={value}" for key, value in (config_settings or {}).items()]
    said += [os.environ.get(each, "") for each in ("SKBUILD_CMAKE_DEFINE", "SKBUILD_CMAKE_ARGS")]
    said.append(os.environ.get("CMAKE_ARGS", ""))
    match = re.search(rf"(?:\b|-D){name}(?::\w+)?=([^\s'\"\]]+)", "\n".join(said))
    return match[1] if match else ""


def requirements(config_settings: Settings) -> list[str]:
    """CUTLASS, if the build will want its headers and is not told where they are."""
    choice = definition("NATTEN_CUDA", config_settings)
    if choice == "OFF" or definition("NATTEN_CUTLASS_DIR", config_settings):
        return []
    is_wanted = choice == "ON" or definition("NATTEN_CUDA_ARCHS", config_settings)
    compiler = definition("CMAKE_CUDA_COMPILER", config_settings)
    if is_wanted or find_native(compiler or None).archs:
        return [REQUIREMENT.read_text().strip()]
    return []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """PEP 517: what is needed beside `build-system.requires`."""
    return [
        *scikit_build.get_requires_for_build_wheel(config_settings),
        *requirements(config_settings),
    ]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """PEP 660: the same for an editable installation."""
    return [
        *scikit_build.get_requires_for_build_editable(config_settings),
        *requirements(config_settings),
    ]
