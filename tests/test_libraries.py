# SPDX-License-Identifier: MIT
"""Libraries of kernels that are loaded at run time, made here of tests/library.cpp: what is refused, and what is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import natten
from natten import _C

pytestmark = pytest.mark.cpu  # its kernels run there

ROOT = Path(__file__).parents[1]
CURRENT = "natten::cuda::kAbiVersion"


def build(
    path: Path,
    name: str = "probe",
    on_host: int = 1,
    abi: str = CURRENT,
    driver: int = 13000,
) -> Path:
    """The library with kernels of this name, compiled to `path`."""
    defined = {
        "TEST_NAME": f'"{name}"',
        "TEST_ON_HOST": on_host,
        "TEST_ABI": abi,
        "TEST_DRIVER": driver,
    }
    command = (
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'include'}"),
        *(f"-D{macro}={value}" for macro, value in defined.items()),
        *(str(ROOT / "tests" / "library.cpp"), "-o", str(path)),
    )
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """The policy of kernels that run on the CPU and fail with what they were launched with."""
    if "fna:probe" not in natten._dispatch._policies():
        natten.load_kernels(build(tmp_path_factory.mktemp("library") / "libprobe.so"))
    return "fna:probe"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A library of kernels for GPUs."""
    return build(tmp_path_factory.mktemp("sound") / "libsound.so", name="sound", on_host=0)


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"path = '.*/none.so' is not a library .* No such file"):
        natten.load_kernels(tmp_path / "none.so")


def test_not_a_shared_library(tmp_path):
    (tmp_path / "text.so").write_text("kernels")
    with pytest.raises(ValueError, match=r"path = '.*/text.so' is not a library of natten kernels"):
        natten.load_kernels(tmp_path / "text.so")


def test_a_library_of_something_else(tmp_path):
    (tmp_path / "other.cpp").write_text("int answer() { return 42; }")
    source, library = str(tmp_path / "other.cpp"), tmp_path / "libother.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", str(library)], check=True)
    with pytest.raises(ValueError, match="undefined symbol: natten_cuda_library"):
        natten.load_kernels(library)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("no table", "its function natten_cuda_library returns no table"),
        ("no kernels", "its table of 2 kernels is not there"),
        ("no name", "its kernel 0 has no name"),
        ("no entry", "its kernel 0 has no entry point for its op"),
        ("huge tiles", "its kernel 0 has tiles of 4096 and 32 tokens; wanted powers of two"),
        ("no archs", "its kernel 0 has no architectures"),
        ("foreign table", "its function natten_cuda_library returns no table of its own"),
        ("foreign kernels", "its table of 2 kernels is not there"),
        ("too many kernels", "its table of 1073741824 kernels is not there"),
        ("foreign name", "its kernel 1 has no name inside the library"),
        ("foreign policy", "its kernel 1 has no backend or no policy inside the library"),
        ("foreign entry", "its kernel 1 has no entry point for its op inside the library"),
        ("entry of data", "its kernel 1 has no entry point for its op inside the library"),
        ("foreign workspace", "its kernel 1 has no entry point for its op inside the library"),
        ("foreign archs", "its kernel 1 has no architectures inside the library"),
        ("too many archs", "its kernel 1 has no architectures inside the library"),
        ("foreign toolkit", "it does not say what built it"),
        ("foreign driver", "it cannot tell the driver's version"),
    ],
)
def test_a_table_that_is_wrong(fault, match, tmp_path, sound, monkeypatch):
    """Nothing is read or called that is not in the library: pointers that are not null may lead anywhere."""
    monkeypatch.setenv("TEST_FAULT", fault)
    library = shutil.copy(sound, tmp_path / "libwrong.so")  # which no process has loaded
    with pytest.raises(ValueError, match=match):
        natten.load_kernels(library)


def test_data_for_a_function(tmp_path):
    (tmp_path / "data.cpp").write_text('extern "C" { long natten_cuda_library = 42; }')
    library = tmp_path / "libdata.so"
    compiler = os.environ.get("CXX", "g++")
    command = (compiler, "-shared", "-fPIC", str(tmp_path / "data.cpp"), "-o", str(library))
    subprocess.run(command, check=True)
    with pytest.raises(ValueError, match="its symbol natten_cuda_library is no function"):
        natten.load_kernels(library)


def test_files_that_are_no_whole_library(tmp_path):
    """None of them is given to the dynamic loader, which would hang, or run into what is not there."""
    whole = build(tmp_path / "libwhole.so", name="whole").read_bytes()
    broken = tmp_path / "libbroken.so"
    for size in (*range(0, 64, 9), *range(64, len(whole), len(whole) // 23)):
        broken.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated: \d+ bytes|no 64-bit shared library"):
            natten.load_kernels(broken)
    machine = 18  # e_machine
    broken.write_bytes(whole[:machine] + b"\xf7\x00" + whole[machine + 2 :])
    with pytest.raises(ValueError, match=r"for another machine \(ELF machine 247"):
        natten.load_kernels(broken)
    os.mkfifo(tmp_path / "pipe.so")
    with pytest.raises(ValueError, match="it is no regular file"):
        natten.load_kernels(tmp_path / "pipe.so")
    with pytest.raises(ValueError, match="it is no regular file"):
        natten.load_kernels(tmp_path)


def test_another_version(tmp_path):
    library = build(tmp_path / "libold.so", abi=f"{CURRENT}-1")
    with pytest.raises(ValueError, match=r"interface \d+ .*; build it again with this version's"):
        natten.load_kernels(library)
    assert str(library) not in [path for path, _, _ in _C.libraries()]


def test_names_that_are_taken(tmp_path, probe):
    before = _C.libraries()
    with pytest.raises(ValueError, match="has a kernel 'probe_forward', and there is one already"):
        natten.load_kernels(build(tmp_path / "libagain.so"))
    assert _C.libraries() == before


# What is run ---------------------------------------------------------------------------------------------------------

DRIVER = """
import sys
from natten import _C
_C.load_kernels(sys.argv[1])
rows = _C.candidates(_C.Problem("float32", 2 * (8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8), 1, 1, 1, 48, 48, 0, False, 1.0),
                     "forward", "fna", "", 86)
print(*next(reasons for kernel, reasons in rows if kernel.name == "mine_forward"))
print(*(_C.has_code_for(arch) for arch in (75, 80, 89, 90, 120)))
"""


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (12090, "and the GPU's driver supports CUDA 12.9 at most"),
        (0, "and the GPU's driver was not found"),
        (13000, ""),
        (14010, ""),
    ],
)
def test_the_driver(driver, reason, tmp_path):
    """A driver older than the library's runtime is a reason, found when the library is loaded."""
    library = build(tmp_path / "libmine.so", name="mine", on_host=0, driver=driver)
    command = (sys.executable, "-c", DRIVER, str(library))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, able = done.stdout.splitlines()
    assert reason in said
    assert bool(said) == bool(reason)
    assert able == ("False False False False False" if reason else "False True True False False")


IN_A_GRAPH = """
import sys
from types import SimpleNamespace
import torch, natten
from natten import _dispatch
natten.load_kernels(sys.argv[1])
_dispatch._HAS_CUDA = True
for arch in (75, 80, 86, 90):
    _dispatch._arch_of_device = lambda index, arch=arch: arch
    _dispatch.has_code_for.cache_clear()
    try:
        print(arch, repr(_dispatch.select_in_graph(SimpleNamespace(device=torch.device("cuda", 0)), None)))
    except NotImplementedError as error:
        print(arch, "is left to eager calls")
"""


def test_graphs_take_in_what_eager_calls_would_run(tmp_path):
    """Where no kernel was compiled for a GPU, a graph breaks, and FlexAttention or the reference run as they do eagerly."""
    library = build(tmp_path / "libmine.so", name="mine", on_host=0)
    command = (sys.executable, "-c", IN_A_GRAPH, str(library))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("75 is left to eager calls", "80 ''", "86 ''", "90 is left to eager calls")
    ]


BROKEN = """
import sys
from natten import _C
rows = _C.candidates(_C.Problem("float16", 2 * (8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8), 1, 1, 1, 48, 48, 0, False, 1.0),
                     "forward", "fna", "", 86)
print(*next(reasons for kernel, reasons in rows if "sm80" in kernel.name))
"""


def test_a_library_of_the_package_that_cannot_be_loaded(tmp_path):
    """What the dynamic loader says is the reason, not that there is no such library."""
    folder = tmp_path / "natten"
    shutil.copytree(
        Path(natten.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(_C.__file__, folder)
    (tmp_path / "bad.cpp").write_text(
        "void missing_function(); void* pointer = (void*)missing_function;"
    )
    compiler = os.environ.get("CXX", "g++")
    source, library = str(tmp_path / "bad.cpp"), str(folder / "libnatten_cuda.so")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    loader = "import importlib.util, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        (sys.executable, "-c", loader + BROKEN),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "is in a library that cannot be loaded" in done.stdout
    assert "missing_function" in done.stdout


IN_A_PROCESS_OF_ITS_OWN = """
import sys, torch, natten
from natten import _C, info
natten.load_kernels(sys.argv[1])
x = torch.empty(1, 8, 8, 1, 48)
print(natten.explain(x, x, x, kernel_size=3, device="sm_86").selected.kernel)
print(natten.explain(x, x, x, kernel_size=3).selected.backend)
(kernel,) = (k for k in _C.kernels("cuda") if k.name == "mine_forward")
print(kernel.op, kernel.isa, kernel.tile, kernel.archs, kernel.is_emulated)
rows = _C.candidates(_C.Problem("float32", 2 * (8, 3, 1, 1, 0, 0, 0, 0, 8, 0, 8), 1, 1, 1, 48, 48, 0, False, 1.0),
                     "forward", "fna", "", 89)
print([kernel.name for kernel, reasons in rows if not reasons])
print(info.report())
"""


def test_a_plug_in_for_gpus(tmp_path):
    """Its kernels come first, on the architectures that they are for, and `natten.info` lists them."""
    library = build(tmp_path / "libmine.so", name="mine", on_host=0)
    command = (sys.executable, "-W", "error", "-c", IN_A_PROCESS_OF_ITS_OWN, str(library))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    selected, on_cpu, row, on_sm89, *report = done.stdout.splitlines()
    assert selected == "mine_forward"
    assert on_cpu in ("fna", "naive")
    assert row == "forward mine (64, 32) [80, 86] False"
    assert on_sm89 == "['mine_forward']"  # by the code for SM86
    assert f"  {library}: 2 kernels, no toolkit" in report
    (line,) = (line for line in report if line.startswith("  mine_forward "))
    assert line.split(maxsplit=1)[1] == (
        "mine      SM80 to SM90, compiled for SM80, SM86 float32, head dims up to 64"
    )


def test_emulated_kernels_are_run_only_by_name(probe):
    x = torch.randn(1, 8, 8, 1, 48)
    names = {kernel.name for kernel in _C.kernels("emulation")}
    assert {"probe_forward", "probe_backward"} <= names
    assert natten.explain(x, x, x, kernel_size=3).selected.kernel not in names
    found = natten.explain(x, x, x, kernel_size=3, device="sm_86")
    assert names.isdisjoint(candidate.kernel for candidate in found.candidates)
    found = natten.explain(x, x, x, kernel_size=3, backend=probe)
    assert [candidate.kernel for candidate in found.candidates] == ["probe_forward"]
    with pytest.raises(NotImplementedError, match="computes float32, and the problem is float64"):
        natten.na2d(x.double(), x.double(), x.double(), 3, backend=probe)


class Launch(NamedTuple):
    """What a kernel says that it was launched with."""

    by_query: tuple[
        tuple[int, ...], tuple[int, ...]
    ]  # shapes of the tiles it owns, and of those it streams
    by_key: tuple[tuple[int, ...], tuple[int, ...]]
    stream: int
    workspace: int

    @classmethod
    def of(cls, error):
        numbers = list(map(int, re.findall(r"\d+", str(error.value))))
        shapes = [tuple(numbers[i : i + 3]) for i in range(0, 12, 3)]
        return cls((shapes[0], shapes[1]), (shapes[2], shapes[3]), *numbers[12:])


def flat_axes(grid):
    return [n for extent in grid for n in (extent, 3, 1, 1, 0, 0, 0, 0, extent, 0, extent)]


def forward(probe, grid, **settings):
    x = torch.randn(1, *grid, 1, 48)
    with pytest.raises(RuntimeError, match="by query") as error:
        natten.neighborhood_attention_generic(x, x, x, 3, backend=probe, **settings)
    return Launch.of(error)


def backward(probe, grid, tile_shapes=()):
    x = torch.randn(1, *grid, 1, 48)
    settings = flat_axes(grid), 1.0, probe, tile_shapes
    with pytest.raises(RuntimeError, match="by query") as error:
        torch.ops.natten.backward(x, x, x, None, None, None, x, x[..., 0], x, None, *settings)
    return Launch.of(error)


def by_cost(grid, of_keys):
    """The shapes that cost least, which tests/test_tiles.py checks."""
    problem = _C.Problem("float32", flat_axes(grid), 1, 1, 1, 48, 48, 0, False, 1.0)
    shapes = problem.tile_shapes(of_keys, 64, 32)
    return tuple((1,) * (3 - len(grid)) + tuple(shape) for shape in shapes)


NO_TILES = ((1, 1, 1), (1, 1, 1))


@pytest.mark.parametrize("grid", [(500,), (64, 64), (8, 3, 64)], ids=str)
def test_launch(grid, probe):
    """Kernels get tiles of the sizes they are compiled for, by cost, and their workspace."""
    assert forward(probe, grid) == (by_cost(grid, False), NO_TILES, 0, 0)
    assert backward(probe, grid) == (by_cost(grid, False), by_cost(grid, True), 0, 1)


# Tile shapes of the user ---------------------------------------------------------------------------------------------


def test_tile_shapes_reach_the_kernel(probe):
    tiles = {"q_tile_shape": (4, 16), "kv_tile_shape": (16, 2)}
    assert forward(probe, (64, 64), **tiles).by_query == ((1, 4, 16), (1, 16, 2))
    assert forward(probe, (8, 64, 64), q_tile_shape=(4, 4, 4)).by_query[0] == (4, 4, 4)
    assert forward(probe, (64, 64), kv_tile_shape=[32, 1]).by_query[1] == (1, 32, 1)
    one_axis = {"q_tile_shape": 64, "kv_tile_shape": (32,)}
    assert forward(probe, (500,), **one_axis).by_query == ((1, 1, 64), (1, 1, 32))
    other_direction = forward(probe, (64, 64), backward_kv_tile_shape=(2, 32))
    assert other_direction.by_query == by_cost((64, 64), False)


def test_tile_shapes_of_backward(probe):
    """A shape counts for the passes in which it has the right number of tokens: 64 owned, 32 streamed."""
    grid = (64, 64)
    said = backward(probe, grid, (0, 0, 0, 0, 4, 16, 16, 2))
    assert (said.by_query, said.by_key) == (((1, 4, 16), (1, 16, 2)), by_cost(grid, True))
    said = backward(probe, grid, (0, 0, 0, 0, 16, 2, 4, 16))
    assert (said.by_query, said.by_key) == (by_cost(grid, False), ((1, 4, 16), (1, 16, 2)))
    said = backward(probe, grid, (4, 16, 16, 2, 0, 0, 0, 0))
    assert (said.by_query, said.by_key) == (by_cost(grid, False), by_cost(grid, True))


def test_tile_shapes_that_are_not_compiled_in(probe):
    x = torch.randn(1, 64, 64, 1, 48)
    wanted = (
        r"wanted boxes of as many tokens as a kernel is compiled for: probe_forward has 64 and 32"
    )
    for name, shape, said in (
        ("q_tile_shape", (8, 16), r"\(8, 16\) and any"),
        ("kv_tile_shape", (8, 8), r"any and \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"^q_tile_shape, kv_tile_shape = {said}; {wanted}$"):
            natten.na2d(x, x, x, 3, backend=probe, **{name: shape})
    # Before the forward pass, while it is plain whose fault it is; without gradients, it is nobody's.
    tiles = {"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (8, 2)}
    with pytest.raises(RuntimeError, match="by query"):
        natten.na2d(x, x, x, 3, backend=probe, **tiles)
    x.requires_grad_()
    with pytest.raises(
        ValueError, match=r"^backward_q_tile_shape, .* probe_backward has 64 or 32$"
    ):
        natten.na2d(x, x, x, 3, backend=probe, **tiles)


@pytest.mark.parametrize(
    ("own", "streamed"), [(512, 64), (64, 1 << 20), (48, 64), (64, 0), (-64, 64)]
)
def test_tiles_that_no_kernel_can_have(own, streamed):
    problem = _C.Problem("float32", flat_axes((64, 64)), 1, 1, 1, 48, 48, 0, False, 1.0)
    with pytest.raises(ValueError, match=f"own = {own}, streamed = {streamed}; wanted powers of"):
        problem.tile_shapes(False, own, streamed)
    shapes = problem.tile_shapes(True, 256, 256)
    assert [a * b for a, b in shapes] == [256, 256]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"q_tile_shape": (8, 8, 1)}, r"q_tile_shape = \(8, 8, 1\); wanted one value, or 2"),
        ({"kv_tile_shape": (0, 64)}, r"kv_tile_shape = \(0, 64\); wanted at least 1 token"),
        ({"backward_q_tile_shape": "8x8"}, r"backward_q_tile_shape\[0\] = '8x8'; wanted an int"),
        ({"backward_kv_tile_shape": (8, 8.0)}, r"backward_kv_tile_shape\[1\] = 8.0; wanted an int"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference", "fna:probe"])
def test_tile_shapes_that_mean_nothing(settings, match, backend, probe):
    x = torch.randn(1, 8, 8, 1, 48)
    with pytest.raises(ValueError, match=match):
        natten.na2d(x, x, x, 3, backend=backend, **settings)


def test_where_kernels_have_no_such_tiles_shapes_say_nothing():
    x = torch.randn(1, 9, 9, 1, 16, requires_grad=True)
    for backend in ("fna", "naive", "reference"):
        plain = natten.na2d(x, x, x, 3, backend=backend)
        tiled = natten.na2d(
            x, x, x, 3, backend=backend, q_tile_shape=(3, 3), backward_q_tile_shape=5
        )
        assert torch.equal(tiled, plain)
        (gradient,) = torch.autograd.grad(tiled.sum(), x)
        assert torch.equal(gradient, torch.autograd.grad(plain.sum(), x)[0])


# torch 2.14's own opcheck looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("tile_shapes", [[8, 8, 4, 8, 0, 0, 0, 0], [0] * 8])
def test_ops_with_tile_shapes(tile_shapes):
    """torch's own check of the ops, and second derivatives, with the argument."""
    x = torch.randn(1, 5, 6, 1, 8, dtype=torch.float64, requires_grad=True)
    arguments = (x, x, x, None, None, None, flat_axes((5, 6)), 0.5, "naive", tile_shapes)
    torch.library.opcheck(torch.ops.natten.forward.default, arguments)

    def run(tokens):
        return torch.ops.natten.forward(tokens, tokens, tokens, *arguments[3:])[0]

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True)
    batched = torch.vmap(run)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], run(2 * x))
