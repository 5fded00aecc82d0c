# SPDX-License-Identifier: MIT
"""What the README and the pages of docs/ show is true: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
README = (ROOT / "README.md").read_text()


def test_examples_run() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    # What needs weights in memory is a page of its own, and goes on from the README's examples.
    blocks += re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "unfused.md").read_text(), re.DOTALL
    )
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102  # later blocks use names of earlier ones
    assert names["output"].shape == (2, 32, 32, 4, 64)
    assert names["tokens"].shape == (2, 32, 32, 128)
    assert names["query"].grad is not None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    quoted = re.findall(
        r"`((?:python|src|include|docs|tests|bench)/[\w./]+)`", (ROOT / page).read_text()
    )
    for path in quoted:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)\b", (ROOT / page).read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
