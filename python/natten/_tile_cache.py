# SPDX-License-Identifier: MIT
"""The file in which the autotuner keeps the tile shapes that it found, for all processes of a user.

Any number of processes and threads may read and write it at once, and nothing in it is trusted: what is damaged counts as
not there, and is replaced when something is written next.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from pathlib import Path

# Seconds to wait for others who write; each takes milliseconds.
_PATIENCE = 10


def find(key: str) -> tuple[int, ...] | None:
    """What is kept under a key, if anything is."""
    try:
        return _read(_path()).get(key)
    except OSError:
        return None


def keep(key: str, shapes: tuple[int, ...]) -> None:
    """Adds an entry to the file; warns if that cannot be."""
    import filelock  # it takes as long to import as a tenth of this package, and is needed on few machines

    try:
        path = _path()
        fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(f"{path.name}.lock"), timeout=_PATIENCE):
            entries = {**_read(path), key: shapes}
            try:
                fresh.write_text(json.dumps(entries, indent=0))
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        message = f"tile shapes are not kept: {error}; set NATTEN_CACHE_DIR to a folder that can be written"
        warnings.warn(message, stacklevel=2)


def _path() -> Path:
    folder = os.environ.get("NATTEN_CACHE_DIR")
    if folder:
        return Path(folder) / "tile_shapes.json"
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # the user has no home
        raise OSError(error) from error
    return Path(caches) / "natten" / "tile_shapes.json"


def _read(path: Path) -> dict[str, tuple[int, ...]]:
    """The entries that are whole."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):  # the last of brackets, thousands deep
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: tuple(shapes) for key, shapes in found.items() if _is_shapes(shapes)}


def _is_shapes(value: object) -> bool:
    return isinstance(value, list) and all(type(side) is int and side > 0 for side in value)
