# SPDX-License-Identifier: MIT
"""natten.flops: what is counted is what brute force says attends, by shapes, by torch and by fvcore."""

from __future__ import annotations

import logging
import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import flops, functional
from tests import oracle_unfused
from tests.test_compat import GRIDS, plain

pytestmark = pytest.mark.cpu

BATCH, HEADS, HEAD_DIM = 2, 3, 4


def attended(problem):
    return int(oracle_unfused.slots(problem).present.sum())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_last", [False, True])
def test_counts_by_shapes(rank, is_causal, heads_last):
    grid = GRIDS[str(rank)]
    problem = plain(grid, 3, 2, is_causal)
    pairs = BATCH * HEADS * attended(problem)
    shape = (BATCH, *grid, HEADS) if heads_last else (BATCH, HEADS, *grid)
    tokens, values, weights = (*shape, HEAD_DIM), (*shape, 6), (*shape, 3**rank)
    window = (3, 2, is_causal, heads_last)
    assert flops.fna_flop_count(tokens, tokens, values, *window) == 2 * pairs * (HEAD_DIM + 6)
    assert flops.fna_flop_count(tokens, tokens, values, *window, True) == pairs * (HEAD_DIM + 6)
    assert flops.na_qk_flop_count(tokens, tokens, *window) == 2 * pairs * HEAD_DIM
    assert flops.na_qk_flop_count(tokens, tokens, *window, return_macs=True) == pairs * HEAD_DIM
    assert flops.na_av_flop_count(weights, values, *window) == 2 * pairs * 6
    assert flops.na_av_flop_count(weights, values, *window, return_macs=True) == pairs * 6
    if not is_causal:  # every token attends to a whole window
        assert attended(problem) == math.prod(grid) * 3**rank


def test_shapes_of_no_grid():
    with pytest.raises(ValueError, match="q_shape"):
        flops.fna_flop_count((1, 2, 3), (1, 2, 3), (1, 2, 3), 3, 1, False)
    with pytest.raises(ValueError, match="kernel_size"):
        flops.na_qk_flop_count((1, 2, 5, 3), (1, 2, 5, 3), 7, 1, False)


class Model(torch.nn.Module):
    """A projection, fused attention in a module, and unfused attention in a function: all that can be counted."""

    def __init__(self):
        super().__init__()
        self.fused = natten.NeighborhoodAttention2D(12, 3, 3, rel_pos_bias=True)

    def forward(self, x):
        heads_first = self.fused(x).unflatten(-1, (3, 4)).movedim(-2, 1)
        rpb = self.fused.rpb
        attn = functional.na2d_qk(heads_first, heads_first, 3, is_causal=(True, False), rpb=rpb)
        return functional.na2d_av(attn.softmax(-1), heads_first, 3, is_causal=(True, False))


def test_models_counted_by_fvcore(caplog):
    fvcore = pytest.importorskip("fvcore.nn")
    x = torch.randn(2, 7, 8, 12)
    module = 2 * HEADS * 7 * 8 * 9 * 2 * HEAD_DIM
    halves = 2 * HEADS * attended(plain((7, 8), 3, 1, (True, False))) * 2 * HEAD_DIM
    projections = 2 * 7 * 8 * 12 * (3 * 12 + 12)
    total = projections + module + halves
    model = Model()
    with caplog.at_level(logging.WARNING):
        assert flops.get_flops(model, x, disable_warnings=True) == total
    assert not caplog.records
    counter = flops.add_natten_handle(fvcore.FlopCountAnalysis(model, x))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    assert counter.by_module()["fused"] == projections + module
    with torch.no_grad(), FlopCounterMode(display=False) as by_torch:
        model(x)
    assert by_torch.get_total_flops() == 2 * total


def test_fvcore_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(ImportError, match="pip install fvcore"):
        flops.get_flops(torch.nn.Identity(), torch.randn(1))


@pytest.mark.filterwarnings("ignore:.* is an old name:DeprecationWarning")
def test_old_handles_are_the_new_ones():
    for rank in (1, 2, 3):
        assert getattr(flops, f"qk_{rank}d_rpb_flop") is flops.qk_flop
        assert getattr(flops, f"av_{rank}d_flop") is flops.av_flop
    with pytest.raises(AttributeError, match="no_such_name"):
        flops.no_such_name  # noqa: B018
