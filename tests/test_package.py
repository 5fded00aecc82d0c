# SPDX-License-Identifier: MIT
"""The package as installed: what it exports, what importing it costs, its examples."""

from __future__ import annotations

import doctest
import importlib
import re
import statistics
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import natten
from natten import _C

pytestmark = pytest.mark.cpu


def test_exports():
    for name in natten.__all__:
        assert hasattr(natten, name), name
    assert natten.HAS_LIBNATTEN is True
    assert natten.__version__ == metadata.version("natten")
    # Above both generations that programs written for natten ask for.
    assert tuple(map(int, natten.__version__.split(".")[:2])) >= (0, 30)


@pytest.mark.parametrize(
    "module", ["natten.functional", "natten.modules", "natten._dispatch", "natten._merge"]
)
def test_examples(module):
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    if module == "natten.functional":
        assert results.attempted >= 15


def test_module_examples():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for rank in (1, 2, 3):
        (test,) = finder.find(getattr(natten, f"NeighborhoodAttention{rank}D"), globs={}, name="x")[
            :1
        ]
        assert test.examples
        assert runner.run(test).failed == 0


def test_dir_lists_what_is_imported_when_it_is_asked_for():
    code = (
        "import natten, sys\n"
        "names = set(dir(natten))\n"
        "assert names >= {*natten.__all__, *natten._LAZY, 'functional', 'context'}, names\n"
        "assert 'natten.varlen' not in sys.modules\n"
        "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"
        "assert all(hasattr(natten, name) for name in names)\n"
    )
    python(code)


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_takes_little():
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import natten\n"
        "print(time.perf_counter() - start)\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'torch.nn.attention.flex_attention', 'numpy')\n"
        "assert not [m for m in heavy if m in sys.modules and m not in before]\n"
    )
    seconds = statistics.median(float(python(code)) for _ in range(3))
    assert seconds < 0.5  # 0.03 s where nothing else runs; the bound allows for a busy machine


def test_import_order_does_not_matter():
    python("import natten, torch; x = torch.randn(1, 8, 1, 4); natten.na1d(x, x, x, 3)")


def test_a_missing_core_is_explained():
    code = (
        "import sys\n"
        "import importlib.machinery\n"
        "sys.modules['natten._C'] = None\n"
        "try:\n"
        "    import natten\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip install" in python(code)


def test_import_without_metadata_of_a_distribution():
    """As in a frozen program, or in a copy inside another package."""
    code = (
        "from importlib import metadata\n"
        "def version(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "import torch\n"
        "metadata.version = metadata.distribution = version\n"
        "import natten\n"
        "print(natten.__version__)\n"
    )
    assert python(code).strip() == natten.__version__


def test_info():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "natten.info"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert natten.__version__ in result.stdout
    for kernel in _C.kernels():
        assert kernel.name in result.stdout
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert re.search(rf"{dtype}\s+\w+_forward_\w+", result.stdout)
