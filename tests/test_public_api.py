# SPDX-License-Identifier: MIT
"""Public names and signatures stay what they are, but for changes that are meant."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

PROGRAM = Path(__file__).with_name("list_public_api.py")
LISTED = Path(__file__).with_name("public_api.txt")


def test_names_and_signatures_are_those_listed() -> None:
    # In a process of its own: to look at old names uses up what they say once.
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = LISTED.read_text().splitlines(), done.stdout.splitlines()
    difference = list(difflib.unified_diff(*lines, "listed", "found", lineterm=""))
    assert not difference, "\n".join(difference)
