# SPDX-License-Identifier: MIT
"""Loggers. The package itself logs nothing; it raises, warns, and explains (`natten.explain`)."""

from __future__ import annotations

import logging
import os


def get_logger(name: str) -> logging.Logger:
    """A logger of that name, on the level that the environment variable NATTEN_LOG_LEVEL says, if it says one.

    Args:
        name: As in `logging.getLogger`.

    Returns:
        The logger of the standard library. A level that does not exist is ignored.

    Example:
        >>> from natten.utils import log
        >>> log.get_logger("my_model").name
        'my_model'
    """
    logger = logging.getLogger(name)
    level = logging.getLevelName(os.environ.get("NATTEN_LOG_LEVEL", "").upper())
    if isinstance(level, int):
        logger.setLevel(level)
    return logger
