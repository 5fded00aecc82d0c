# SPDX-License-Identifier: MIT
"""The error for wrong arguments, and its wording."""

from __future__ import annotations

from typing import NoReturn


class ArgumentError(ValueError, RuntimeError):
    """An argument that means nothing.

    A ``ValueError``; also a ``RuntimeError``, which is what the oldest callers catch.
    """


def reject(argument: str, value: object, wanted: str, remedy: str = "") -> NoReturn:
    """Raises the error for `argument`: what it was, what is wanted, and what to do about it."""
    advice = f": {remedy}" if remedy else ""
    message = f"{argument} = {value}; wanted {wanted}{advice}"
    raise ArgumentError(message)
