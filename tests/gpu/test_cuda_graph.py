"""Whole steps replayed from a CUDA graph train as launched ones do."""

from __future__ import annotations

import pytest
import torch

from fastmoco.distributed.world import World
from fastmoco.train.graph import WARM_UP
from runs import BATCH, shared_batch, shared_trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["moco", "mse", "barlow"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_step_trains_as_a_launched_one(method: str, precision: str) -> None:
    rows = {}
    for graph in (False, True):
        world = World(device=torch.device("cuda:0"))
        t = shared_trainer(world, method, precision=precision, cuda_graph=graph)
        for number in range(WARM_UP + 4):
            t.step([shared_batch(world, number)], lr=1e-3)
        rows[graph] = t.history.read()
        assert t.queue.pointer.item() == BATCH * (WARM_UP + 4) % len(t.queue.bank)
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    for launched, replayed in zip(rows[False], rows[True], strict=True):
        assert replayed["loss"] == pytest.approx(launched["loss"], rel=tolerance, abs=tolerance)
