"""StageLosses where DDP wraps the network, in Lightning and without: what passes through the parts is seen, and all
processes train alike."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.adapters.stages import StageLosses
from fastmoco.distributed.world import World
from stage_steps import Module, fit, views
from worlds import in_world

STAGES = ["0", "2"]
OPTIONS: dict[str, Any] = {"kind": "barlow", "projector_width": 9, "size": 8, "weight": 1.0}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3))


class OwnViews(Module):
    """Each process has pictures of its own."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        assert isinstance(self.trainer.model, DistributedDataParallel)
        return super().training_step([view ** (self.global_rank + 1) for view in batch], index)


def _in_lightning(world: World) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    # As a launcher sets them: the processes have met, and Lightning is to start none.
    os.environ |= {"LOCAL_RANK": str(world.rank), "NODE_RANK": "0"}
    module = OwnViews(network(), STAGES, **OPTIONS)
    fit(module, 8, steps=4, strategy="ddp", devices=world.size)
    return {name: weight.detach() for name, weight in module.named_parameters()}, module.found


def _gradients(world: World) -> list[list[Tensor]]:
    """Those of the network and of the projectors in a plain loop, with DDP and without."""
    found = []
    for wrap in (DistributedDataParallel, lambda module: module):
        model = network()
        key_model = copy.deepcopy(model)
        stage_losses = StageLosses(model, key_model, stages=STAGES, **OPTIONS)
        wrapped, wrapped_losses = wrap(model), wrap(stage_losses)
        x0, x1 = (view ** (world.rank + 1) for view in views(8))
        wrapped(x0)
        with torch.no_grad():
            key_model(x1)
        wrapped_losses().backward()
        found.append([p.grad for p in (*model.parameters(), *stage_losses.parameters())])
    return found


def _both(world: World) -> tuple[Any, ...]:
    # Lightning last: it leaves its mark on the process.
    return _gradients(world), *_in_lightning(world)


@pytest.mark.system
def test_processes_train_alike_under_ddp() -> None:
    ((wrapped, alone), weights, steps), ((wrapped_there, alone_there), weights_there, steps_there) = in_world(2, _both)
    torch.testing.assert_close(wrapped, wrapped_there, rtol=0, atol=0)
    mean = [(a + b) / 2 for a, b in zip(alone, alone_there, strict=True)]
    torch.testing.assert_close(wrapped, mean, rtol=1e-5, atol=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(alone, alone_there, strict=True)) > 1e-3

    torch.testing.assert_close(weights, weights_there, rtol=0, atol=0)
    begun = dict(Module(network(), STAGES, **OPTIONS).named_parameters())
    moved = {name for name, weight in weights.items() if not torch.equal(weight, begun[name])}
    assert all(any(name.startswith(f"{part}.{stage}.") for name in moved)
               for part in ("backbone", "backbone_momentum") for stage in STAGES)  # fmt: skip
    assert any(name.startswith("stage_losses.") for name in moved)
    # Lightning shares the four batches out.
    assert len(steps) == len(steps_there) == 2
    for here, there in zip(steps, steps_there, strict=True):
        assert all(here[stage].isfinite() and not torch.equal(here[stage], there[stage]) for stage in STAGES)
