# SPDX-License-Identifier: MIT
"""docs/migration.md is true: its examples run, the names it promises are there, and those it denies are not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.oracle import assert_close

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
THERE, NOT_THERE = PAGE.split("## What is not there")
NAME = re.compile(r"`(natten(?:\.\w+)+)")

pytestmark = [
    pytest.mark.cpu,  # names
    pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning"),
]


def find(name: str) -> object:
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))  # a module that nobody imported yet
        found = getattr(found, part)
    return found


def test_examples_run() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "migration.md", "exec"), names)  # noqa: S102


def test_windows_of_flash_attention() -> None:
    """What the last example computes is attention under the mask that (left, right) says."""
    names: dict[str, Any] = {}
    (*_, block) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "migration.md", "exec"), names)  # noqa: S102
    query, key, value = (names[name].transpose(1, 2).double() for name in ("q", "k", "v"))
    place = torch.arange(query.shape[2])
    distance = place[None] - place[:, None]
    left, right = names["left"], names["right"]
    for name, before, behind in (
        ("both", left, left),
        ("even", left, left - 1),
        ("causal", left, 0),
        ("uneven", left, right),
        ("long", 1000, 1000),
        ("streamed", left, 0),
    ):
        mask = (-before <= distance) & (distance <= behind)
        expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output = names[name].transpose(1, 2)
        assert_close(output, expected[:, :, -output.shape[2] :], 1e-5)


def test_names_are_there() -> None:
    names = set(NAME.findall(THERE))
    assert len(names) > 90
    for name in names:
        find(name)


def test_names_are_not_there() -> None:
    missing = [row.split("|")[1] for row in NOT_THERE.splitlines() if row.startswith("|")]
    names = set(NAME.findall(" ".join(missing))) - {"natten.functional"}
    assert len(names) >= 6
    for name in names:
        with pytest.raises((ImportError, AttributeError)):
            find(name)
