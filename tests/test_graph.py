"""A captured micro-batch trains as the same micro-batch does; the capture itself takes a GPU (tests/gpu)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.graph import GraphedMicroBatch, check_capturable
from fastmoco.train.trainer import Trainer
from runs import shared_batch, shared_trainer, small_config
from worlds import in_world


def _as_recorded(once: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a capture: replays call the function again, on what the capture saw and nothing newer."""
    return once


def graphed(t: Trainer) -> Trainer:
    t.graph = GraphedMicroBatch(t._micro_batch, t.world, capture=_as_recorded, warm_up=2)
    t.engine.keep_gradients()
    return t


def _run(world: World, method: str, graph: bool) -> tuple[dict[str, Tensor], list[dict[str, float]], dict[str, int]]:
    world.sent.clear()
    t = shared_trainer(world, method, precision="fp32", key_shuffle="global", norm="sync")
    if graph:
        graphed(t)
    for number in range(5):
        t.step([shared_batch(world, number)], lr=0.05)
    state = {name: value.clone() for name, value in t.engine.state().items()} | {"queue": t.queue.bank.clone()}
    return state, t.history.read(), dict(world.sent)


@pytest.mark.parametrize(
    ("method", "size"),
    [("moco", 1), ("barlow", 1), *(pytest.param(method, 2, marks=pytest.mark.system) for method in ("moco", "barlow"))],
)
def test_replays_train_as_calls_do(method: str, size: int) -> None:
    plain, replayed = (
        in_world(size, _run, method, graph)[0] if size > 1 else _run(World(), method, graph) for graph in (False, True)
    )
    for name, value in plain[0].items():
        assert torch.equal(value, replayed[0][name]), name
    assert plain[1] == replayed[1] and len(plain[1]) == 5


def test_inputs_are_copied_and_what_is_sent_is_counted_at_each_replay() -> None:
    world = World()
    seen: list[tuple[int, float]] = []

    def run(q: Tensor, k: Tensor, order: Tensor | None) -> Any:
        seen.append((q.data_ptr(), q.sum().item()))
        world.sent["keys"] += 10
        return (q * 2,)

    def capture(once: Callable[[], None]) -> Callable[[], None]:
        once()
        seen.clear()
        return lambda: graph._inputs[0].add_(0)  # a replay runs no Python

    graph = GraphedMicroBatch(run, world, capture=capture, warm_up=1)
    for value in (1.0, 2.0, 3.0):
        graph(torch.full((2,), value), torch.zeros(2), None)
        assert world.sent["keys"] == 10 * value
    assert not seen and graph._inputs[0] is not None and graph._inputs[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "cpu", "is for GPUs"),
        ({"engine": "deepspeed"}, "cuda", "use --engine ddp"),
        ({"accumulate": 2}, "cuda", "needs --accumulate 1"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, Any], device: str, message: str) -> None:
    config = small_config(Path(), Path(), cuda_graph=True, **changes)
    with pytest.raises(UserError, match=message):
        check_capturable(config, World(device=torch.device(device)))
    check_capturable(replace(config, run=replace(config.run, cuda_graph=False)), World())
