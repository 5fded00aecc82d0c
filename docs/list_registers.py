# SPDX-License-Identifier: MIT
"""Tables of registers and spills (docs/kernels.md), from what ``ninja -v`` of a build with ``-Xptxas=-v`` printed.

Usage: python docs/list_registers.py build.log ...
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from natten.build_kernels import resources

COLUMNS = {
    ("FnaForward", ""): "forward",
    ("FnaGradient", "0"): "gradient of queries",
    ("FnaGradient", "1"): "gradient of keys",
    ("GemmQk", ""): "qk",
    ("GemmAv", "0"): "av",
    ("GemmAv", "1"): "av transposed",
}
LINE = re.compile(
    r"(?P<kernel>\w+)<(?P<policy>Sm\w+)<(?P<sizes>[^>]*)>(?:, \(\w+\)(?P<side>\d))? ?>"
    r" for sm_(?P<arch>\d+): (?P<registers>\d+) registers, (?P<spills>\d+)"
)


def sort_key(policy: str) -> tuple[str, int]:
    """By policy and type, then by head dim."""
    name, sizes = policy.split("<")
    element, head_dim, *_ = sizes.split(", ")
    return f"{name} {element}", int(head_dim)


def tables(log: str) -> str:
    """A table for each architecture: a row for each tile, a column for each kernel."""
    cells: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for match in LINE.finditer(resources(log)):
        column = COLUMNS[match["kernel"], match["side"] or ""]
        spills = f" ({match['spills']} B spilled)" if match["spills"] != "0" else ""
        row = f"{match['policy']}<{match['sizes']}>"
        cells[match["arch"]][row][column] = match["registers"] + spills
    lines = []
    for arch, rows in sorted(cells.items()):
        lines += [f"SM{arch}:", "", "| tile | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["| --- |" + " ---: |" * len(COLUMNS)]
        for row in sorted(rows, key=sort_key):
            values = " | ".join(rows[row].get(column, "") for column in COLUMNS.values())
            lines.append(f"| `{row}` | {values} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(tables(Path(name).read_text()))  # noqa: T201
