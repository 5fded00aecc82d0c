# SPDX-License-Identifier: MIT
"""Draws docs/window.svg. What is drawn is what the kernels attend to: ``python docs/draw_window.py``.

With queries and keys of zeros every attended key has the same weight, and with the rows of an identity matrix as values
the output of a query is the list of its weights.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import natten

SIDE = 15  # tokens
CELL = 12  # pixels
GAP = 26
TITLE = 40
QUERY, KEY, SHARED, EMPTY = "#c0392b", "#3b7dd8", "#e8a29a", "#edf0f4"
LEGEND = {
    QUERY: "the query",
    KEY: "keys it attends to",
    SHARED: "keys, and queries with the same window",
}

# Title, second line, query, arguments of na2d.
PANELS: tuple[tuple[str, str, tuple[int, int], dict[str, Any]], ...] = (
    ("kernel_size=5", "25 keys around the query", (7, 7), {}),
    ("at the border", "the window moves inwards", (0, 1), {}),
    ("dilation=2", "every second token", (7, 7), {"dilation": 2}),
    ("stride=3", "runs of queries share a window", (7, 7), {"stride": 3}),
    ("is_causal=(True, False)", "nothing below the query", (7, 7), {"is_causal": (True, False)}),
    ('boundary="mask"', "the window is cut off", (0, 1), {"boundary": "mask"}),
)


def attended(**arguments: Any) -> Tensor:
    """Which keys each query attends to: [query, key], both counted row by row."""
    tokens = SIDE * SIDE
    zeros = torch.zeros(1, SIDE, SIDE, 1, 8)
    identity = torch.eye(tokens).reshape(1, SIDE, SIDE, 1, tokens)
    weights = natten.na2d(zeros, zeros, identity, kernel_size=5, **arguments)
    assert isinstance(weights, Tensor)
    return weights.reshape(tokens, tokens) > 0


def panel(title: str, subtitle: str, query: tuple[int, int], arguments: dict[str, Any]) -> str:
    """One grid, with the query, its window, and the queries that have the same window."""
    windows = attended(**arguments)
    centre = query[0] * SIDE + query[1]
    window = windows[centre]
    shares_window = (windows == window).all(1)
    squares: dict[str, list[str]] = {EMPTY: [], KEY: [], SHARED: [], QUERY: []}
    for token in range(SIDE * SIDE):
        row, column = divmod(token, SIDE)
        colour = KEY if window[token] else EMPTY
        if shares_window[token]:
            colour = SHARED
        if token == centre:
            colour = QUERY
        squares[colour].append(square(column * CELL, TITLE + row * CELL))
    lines = [
        f'<text y="14" font-weight="bold">{escape(title, quote=False)}</text>',
        f'<text y="30">{escape(subtitle, quote=False)}</text>',
        *(f'<path fill="{colour}" d="{"".join(path)}"/>' for colour, path in squares.items()),
    ]
    return "\n".join(lines)


def square(x: int, y: int) -> str:
    """A path."""
    side = CELL - 2
    return f"M{x} {y}h{side}v{side}h-{side}z"


def main() -> None:
    """Writes the picture next to this file."""
    width, height = SIDE * CELL + GAP, TITLE + SIDE * CELL + GAP
    rows = -(-len(PANELS) // 3)
    size = f'width="{3 * width + GAP}" height="{rows * height + 2 * GAP}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for n, content in enumerate(PANELS):
        x, y = GAP + n % 3 * width, GAP + n // 3 * height
        parts.append(f'<g transform="translate({x},{y})">\n{panel(*content)}\n</g>')
    for n, (colour, meaning) in enumerate(LEGEND.items()):
        x, y = GAP + n * 150, GAP + rows * height
        parts.append(f'<path fill="{colour}" d="{square(x, y)}"/>')
        parts.append(f'<text x="{x + CELL + 4}" y="{y + 9}">{meaning}</text>')
    parts.append("</svg>")
    Path(__file__).with_name("window.svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
