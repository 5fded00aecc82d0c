# SPDX-License-Identifier: MIT
"""The search for tile shapes: what it tries, what it keeps, and where it does nothing.

On kernels that fail and say what they were launched with (tests/library.cpp), and on emulated CUDA kernels.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import _autotune, _dispatch, _tile_cache
from natten.context import AutotunerContext, NattenContext
from tests.policies import EMULATION
from tests.test_libraries import Launch, build
from tests.test_tiles import Axis, factorisations, visited

pytestmark = pytest.mark.cpu
OWN, STREAMED = 64, 32  # tokens of the tiles of the kernels in tests/library.cpp


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    if "fna:tuned" not in _dispatch._policies():
        natten.load_kernels(build(tmp_path_factory.mktemp("library") / "libtuned.so", "tuned"))
    return "fna:tuned"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where results are kept; and settings as at import, afterwards."""
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    NattenContext.reset()
    AutotunerContext.reset()


@pytest.fixture
def runs(monkeypatch):
    """What was timed: a launch and its settings. The longer the last side of the tiles, the faster it is said to be."""
    launches = []

    def seconds(run, device, warmup, steps):
        with pytest.raises(RuntimeError, match="by query") as error:
            run()
        launches.append((Launch.of(error), warmup, steps))
        shapes = launches[-1][0].by_query + launches[-1][0].by_key
        return 1 / sum(shape[-1] for shape in shapes)

    monkeypatch.setattr(_autotune, "_seconds", seconds)
    return launches


def attend(policy, grid=(20, 24), kernel_size=(5, 3)):
    x = torch.randn(1, *grid, 1, 48)
    with pytest.raises(RuntimeError, match="by query") as error:
        natten.neighborhood_attention_generic(x, x, x, kernel_size, backend=policy)
    return Launch.of(error)


def axes_of(grid, kernel_size):
    return [Axis(extent, size, 1, 1, False) for extent, size in zip(grid, kernel_size, strict=True)]


def cost(axes, of_keys, own, streamed):
    sides = zip(axes, own, streamed, strict=True)
    return math.prod(visited(axis, of_keys, mine, other) for axis, mine, other in sides)


def test_the_cheapest_shapes_are_timed_and_the_fastest_is_used(policy, runs):
    grid, kernel_size = (20, 24), (5, 3)
    by_cost = attend(policy, grid, kernel_size).by_query
    assert not runs
    natten.use_autotuner(True, steps_forward=3, warmup_steps_forward=1)
    used = attend(policy, grid, kernel_size).by_query
    assert [run[1:] for run in runs] == [(1, 3)] * 4
    tried = [tuple(shape[1:] for shape in launch.by_query) for launch, *_ in runs]
    axes = axes_of(grid, kernel_size)
    every = product(factorisations(OWN, 2), factorisations(STREAMED, 2))
    costs = sorted(cost(axes, False, *pair) for pair in every)
    assert [cost(axes, False, *pair) for pair in tried] == costs[:4]
    assert tried[0] == (by_cost[0][1:], by_cost[1][1:])
    assert used in [launch.by_query for launch, *_ in runs]
    assert used[0][-1] + used[1][-1] == max(q[-1] + k[-1] for q, k in tried)
    # It is remembered: nothing more is timed, and the result is the same.
    count = len(runs)
    assert attend(policy, grid, kernel_size).by_query == used
    assert len(runs) == count
    # Of another problem, nothing is known.
    attend(policy, grid, (3, 3))
    assert len(runs) == 2 * count


def test_thorough_mode_times_all_shapes(policy, runs):
    natten.use_autotuner(True, thorough_mode_forward=True)
    used = attend(policy).by_query
    every = set(product(factorisations(OWN, 2), factorisations(STREAMED, 2)))
    tried = [tuple(shape[1:] for shape in launch.by_query) for launch, *_ in runs]
    assert sorted(tried) == sorted(every)
    assert used == ((1, 1, OWN), (1, 1, STREAMED))  # said to be the fastest


def test_shapes_of_one_axis_need_no_time(policy, runs):
    natten.use_autotuner(True)
    assert attend(policy, (500,), 7).by_query == ((1, 1, OWN), (1, 1, STREAMED))
    assert len(runs) <= 1


def search_backward(policy, is_thorough=False):
    grid, kernel_size = (20, 24), (5, 3)
    x = torch.randn(1, *grid, 1, 48)
    operands = natten._problem.Operands(x, x, x)
    window = (kernel_size, 1, 1, False, "shift", 0, None, None, None, None)
    problem = natten._problem.normalize(operands.describe(), 2, *window)
    settings = (problem.flat_axes, problem.scale, policy)

    def run(shapes):
        cotangents = (x, x[..., 0], x, None)
        return torch.ops.natten.backward(*operands, *cotangents, *settings, shapes)

    return _autotune._search("backward", problem, policy, operands, run, is_thorough, 0, 1)


def test_backward(policy, runs):
    """Tiles of 64 are owned, of 32 streamed: a pair of shapes is for one of the two passes, the other goes by cost."""
    shapes = search_backward(policy)
    assert len(runs) == 8
    axes = axes_of((20, 24), (5, 3))
    every = list(product(factorisations(OWN, 2), factorisations(STREAMED, 2)))
    for of_keys, launches in ((False, runs[:4]), (True, runs[4:])):
        best = sorted(cost(axes, of_keys, *pair) for pair in every)
        tried = [launch.by_key if of_keys else launch.by_query for launch, *_ in launches]
        costs = [cost(axes, of_keys, own[1:], streamed[1:]) for own, streamed in tried]
        assert costs == best[:4]
        other = {launch.by_query if of_keys else launch.by_key for launch, *_ in launches}
        assert len(other) == 1
    assert sorted((math.prod(shapes[:2]), math.prod(shapes[2:]))) == [STREAMED, OWN]


# What is kept --------------------------------------------------------------------------------------------------------


def test_the_next_process_knows(policy, runs, folder):
    natten.use_autotuner(True)
    used = attend(policy)
    count = len(runs)
    file = folder / "tile_shapes.json"
    (key,) = json.loads(file.read_text())
    facts = json.loads(key)
    assert (facts["op"], facts["backend"]) == ("forward", policy)
    assert facts["kernels"] == ["tuned_forward"]
    # Nothing half-written is left.
    assert {path.name for path in folder.iterdir()} == {file.name, f"{file.name}.lock"}
    _autotune._chosen.clear()
    assert attend(policy) == used
    assert len(runs) == count
    attend(policy, kernel_size=(3, 3))
    assert len(json.loads(file.read_text())) == 2
    # A file or an entry that is not ours, or damaged, counts as none, and is written anew.
    others = {"another": [8, 8]}
    texts = ["{", "[1, 2]", "[" * 100_000, '{"a": ' * 100_000, "\x00", "1" * 5000]
    texts += [
        json.dumps({**others, key: entry})
        for entry in (None, "8", 64, {}, [], [1], [8, 8], [1, 64, 1.0, 32], [True, 64, 1, 32])
    ]
    texts += [json.dumps({**others, key: [1, OWN, 1, side]}) for side in (-32, 0, 31, 10**30)]
    for text in texts:
        file.write_text(text)
        _autotune._chosen.clear()
        before = len(runs)
        assert attend(policy) == used
        assert len(runs) == before + count, text[:100]
        found = json.loads(file.read_text())
        assert math.prod(found.pop(key)) == OWN * STREAMED
        assert found in ({}, others)


def write_entries(number, count):
    for i in range(count):
        _tile_cache.keep(f"{number}, {i}", (number + 1, i + 1))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_many_processes_and_threads_write_at_once(folder):
    """Of 3 processes, each with 2 threads, nothing is lost."""

    def work(number):
        threads = [
            threading.Thread(target=write_entries, args=(2 * number + i, 20)) for i in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    expected = {f"{number}, {i}": [number + 1, i + 1] for number in range(6) for i in range(20)}
    assert json.loads((folder / "tile_shapes.json").read_text()) == expected
    assert _tile_cache.find("5, 19") == (6, 20)
    assert len(list(folder.iterdir())) == 2  # the file, and its lock


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("NATTEN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _tile_cache._path() == tmp_path / "home" / ".cache" / "natten" / "tile_shapes.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert _tile_cache._path() == tmp_path / "caches" / "natten" / "tile_shapes.json"
    _tile_cache.keep("key", (1, 2))
    assert _tile_cache.find("key") == (1, 2)


def test_nobody_waits_for_a_file_that_is_none(folder):
    folder.mkdir()
    os.mkfifo(folder / "tile_shapes.json")
    assert _tile_cache.find("key") is None
    _tile_cache.keep("key", (1, 2))
    assert _tile_cache.find("key") == (1, 2)


def test_a_folder_that_cannot_be_written(policy, runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path / "file"))
    natten.use_autotuner(True)
    with pytest.warns(UserWarning, match="tile shapes are not kept: .*; set NATTEN_CACHE_DIR"):
        used = attend(policy)
    assert attend(policy) == used  # in memory it is


# Where there is nothing to do -----------------------------------------------------------------------------------------


def test_nothing_happens_on_the_cpu(runs, folder):
    x = torch.randn(1, 12, 12, 2, 8, requires_grad=True)
    plain = natten.na2d(x, x, x, 3)
    natten.use_autotuner(True, True)
    tuned = natten.na2d(x, x, x, 3)
    assert torch.equal(tuned, plain)
    assert torch.equal(
        torch.autograd.grad(tuned.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0]
    )
    for backend in ("naive", "reference", "flex"):
        natten.na2d(x.detach(), x.detach(), x.detach(), 3, backend=backend)
    y = torch.randn(1, 12, 2, 8)
    natten.attention(y, y, y)
    assert not runs
    assert not folder.exists()


def test_nothing_is_timed_unless_asked_for(policy, runs):
    attend(policy)
    natten.use_autotuner(backward_pass=True)
    attend(policy)  # without gradients there is no backward pass
    natten.use_autotuner(forward_pass=True)
    x = torch.randn(1, 8, 8, 1, 48)
    with pytest.raises(RuntimeError, match="by query"):
        natten.na2d(x, x, x, 3, backend=policy, q_tile_shape=(8, 8))  # the caller has chosen
    natten.disable_autotuner()
    attend(policy)
    assert not runs


def test_nothing_is_timed_where_it_would_do_harm(policy, runs):
    natten.use_autotuner(True)
    x = torch.randn(3, 1, 8, 8, 1, 48)

    def call(tokens):
        return natten.na2d(tokens, tokens, tokens, 3, backend=policy)

    with pytest.raises(RuntimeError, match="by query"), FlopCounterMode(display=False):
        call(x[0])
    with pytest.raises(RuntimeError, match="by query"):
        torch.vmap(call)(x)
    assert not runs


# Real kernels, under emulation ----------------------------------------------------------------------------------------

EMULATED = """
import sys, torch, natten
from natten import _autotune
natten.load_kernels(sys.argv[1])
timed = []
seconds = _autotune._seconds
def counted(run, *settings):
    timed.append(seconds(run, *settings))
    return timed[-1]
_autotune._seconds = counted
torch.manual_seed(0)
operands = [torch.randn(1, 9, 12, 1, 32, dtype=torch.float16, requires_grad=True) for _ in range(3)]
cotangent = torch.randn(1, 9, 12, 1, 32, dtype=torch.float16)
def outcome():
    output = natten.na2d(*operands, (5, 3), backend="fna:sm80")
    return output, *torch.autograd.grad(output, operands, cotangent)
plain = outcome()
natten.use_autotuner(True, True, steps_forward=1, steps_backward=1, warmup_steps_forward=0, warmup_steps_backward=0)
tuned = outcome()
assert len(timed) == 8, timed
for mine, theirs in zip(tuned, plain):
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
outcome()
assert len(timed) == 8, timed
"""


@pytest.mark.skipif(not EMULATION.exists(), reason="needs `make emulation`")
def test_emulated_kernels(folder):
    command = (sys.executable, "-W", "error", "-c", EMULATED, str(EMULATION))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "tile_shapes.json").read_text())
    assert sorted(json.loads(key)["op"] for key in found) == ["backward", "forward"]
    assert {len(shapes) for shapes in found.values()} == {4}
