# SPDX-License-Identifier: MIT
"""What all tests share: the device they run on, and seeds that are fixed and printed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from natten import _C
from tests import policies

pytest.register_assert_rewrite("tests.oracle")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests run: cpu, cuda, or emulation")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: runs on the CPU, whatever --device says")
    config.addinivalue_line("markers", "slow: takes half a minute and more")
    try:
        policies.use_device(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if policies.DEVICE.type == "cuda":
        for category in ("UserWarning", "DeprecationWarning", "FutureWarning"):
            # Torch's compiler has advice for GPUs, on TF32 and the number of multiprocessors, say.
            config.addinivalue_line("filterwarnings", f"ignore::{category}:torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no process still runs one when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made unless a test says otherwise."""
    is_marked = request.node.get_closest_marker("cpu") is not None
    where = torch.device("cpu") if is_marked else policies.DEVICE
    with where:
        yield str(where)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch by the test's name: the same in every run, whatever else runs."""
    number = zlib.crc32(request.node.nodeid.encode())
    print(f"torch seed {number}")  # noqa: T201  # shown if the test fails
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One, unless a test asks for more: problems are small, and on a busy machine idle threads spin for long.

    What asks for more gets them, however small its problem is.
    """
    before, least_work = torch.get_num_threads(), _C.set_least_work(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    _C.set_least_work(least_work)


@pytest.fixture
def counter() -> Iterator[object]:
    """A backend of torch.compile that counts what it compiles."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")  # type: ignore[no-untyped-call]
    torch._dynamo.reset()
