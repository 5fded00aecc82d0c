# SPDX-License-Identifier: MIT
"""Public names and signatures stay what they are, but for changes that are meant."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path

import pytest

from tests import list_public_api

pytestmark = pytest.mark.cpu

LISTED = Path(__file__).with_name("public_api.txt")


def test_names_and_signatures_are_those_listed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names say what is new
        found = list(list_public_api.lines())
    difference = list(
        difflib.unified_diff(LISTED.read_text().splitlines(), found, "listed", "found", lineterm="")
    )
    assert not difference, "\n".join(difference)
