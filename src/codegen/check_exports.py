"""Fails the build where a file compiled for a newer ISA exports a name that other files may share.

Of an inline function that several files define, the linker keeps one copy for everybody. Were that the copy with AVX-512 in
it, then all of the library would need AVX-512, also on CPUs that have none.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path


def strangers(nm: str, namespace: str, objects: list[str]) -> list[str]:
    """Exported names of the object files that do not involve `namespace`.

    Mangled names are compared: demanglers give up on lambdas inside of templates inside of lambdas.
    """
    mangled = "".join(f"{len(part)}{part}" for part in namespace.split("::"))
    listing = subprocess.run(
        [nm, "--defined-only", "--extern-only", "--format=posix", *objects],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(
        {
            line
            for line in listing.splitlines()
            if line
            and not line.endswith(":")
            and mangled not in line
            and not line.startswith("DW.ref.")  # a pointer for exception tables: data
        }
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--stamp", required=True, type=Path, help="touched on success")
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()

    names = strangers(arguments.nm, arguments.namespace, arguments.objects)
    if names:
        listing = "\n  ".join(names)
        message = f"exported, but not of {arguments.namespace}; force-inline or move:\n  {listing}"
        raise SystemExit(message)
    arguments.stamp.touch()


if __name__ == "__main__":
    main()
