# SPDX-License-Identifier: MIT
"""What all tests share: the device they run on, and seeds that are fixed and printed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.oracle")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors live: cpu, cuda, ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"no device {name!r} here: {error}")
    return name


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch by the test's name: the same in every run, whatever else runs."""
    number = zlib.crc32(request.node.nodeid.encode())
    print(f"torch seed {number}")  # noqa: T201  # shown if the test fails
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One, unless a test asks for more: problems are small, and on a busy machine idle threads spin for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counter() -> Iterator[object]:
    """A backend of torch.compile that counts what it compiles."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
    torch._dynamo.reset()
