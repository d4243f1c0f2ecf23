"""Whole steps of the objectives beside MoCo: over processes, in micro-batches, from checkpoints, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_steps import (
    Cases,
    alone,
    assert_gradients_are_scaled,
    compare,
    distance,
    engine,
    sketch,
    trained_in_turn,
)
from fastmoco.distributed.exchange import draw_order
from fastmoco.distributed.world import World
from fastmoco.train import trainer
from fastmoco.train.checkpoint import Store
from fastmoco.train.joint import draw_share
from fastmoco.train.trainer import Trainer
from objectives import OBJECTIVES, TARGETS, changes_of, order_within
from parity import assert_states_close
from runs import BATCH, shared_batch, shared_trainer
from worlds import in_world

# The loss at the stages that each is tried with.
METHODS = {"symmetric": "barlow", "simclr": "mse", "supcon": "moco", "barlow-twins": "mse", "mixed": "barlow"}
LR = 0.05


def case(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    return METHODS[name], {"precision": "fp64", "norm": "sync"} | changes_of(name) | changes


@pytest.fixture
def mixed_as_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one process mix the pictures that two would, each of which mixes its own."""

    def draw(seed: int, micro_batch: int, rank: int, rows: int) -> Tensor:
        return order_within(2, seed, micro_batch, rows)

    monkeypatch.setattr(trainer, "draw_order", draw)


# One that has an average and a queue, and one that has neither and goes through its encoder thrice; the others are
# cases for the system's tests.
FAST = ("symmetric", "mixed")
ZERO = [engine(stage, name, slow=True) for stage, name in (("zero1", "simclr"), *(("zero3", name) for name in FAST))]


@pytest.mark.parametrize(
    ("engine", "name"), [*(engine("ddp", name, slow=name not in FAST) for name in OBJECTIVES), *ZERO]
)
def test_two_processes_take_the_steps_of_one(engine: str, name: str, mixed_as_by_two: None) -> None:
    """Losses, gradients, weights, momentum, average and queue of two steps: to nine digits where there is float64."""
    exact = engine == "ddp"
    cases: Cases = [case(name, precision="fp64" if exact else "fp32")]
    (expected,) = alone(cases, 2)
    ((first,), (second,)) = in_world(2, trained_in_turn, [(m, c | {"engine": engine}) for m, c in cases], 2)
    if exact:
        compare(expected, first, 1e-9, "gradient")
        assert max(distance(expected, first, kind) for kind in ("gradient0", "gradient1", "momentum")) < 1e-9
    else:
        compare(expected, first, 3e-2)
        assert torch.allclose(first["loss.0"], expected["loss.0"], rtol=1e-5, atol=1e-6)
        # Single ReLUs flip; a gradient of another factor would be further off.
        assert distance(expected, first, "momentum") < 3e-2
    for key, value in first.items():
        assert key.startswith("sent.") or torch.equal(value, second[key]), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_follows_the_mean_of_its_micro_batches_losses(name: str) -> None:
    """Each of its own images, pictures that it mixes anew, and the queue as the one before left it; by hand, with one
    backward of all of a step's."""
    method, changes = case(name, norm="batch")
    own = shared_trainer(World(), method, **changes, accumulate=2)
    hand = shared_trainer(World(), method, **changes)
    module, config = hand.module, hand.config
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=LR, momentum=config.optim.sgd_momentum, weight_decay=config.optim.weight_decay
    )
    bank = None if hand.queue is None else hand.queue.bank.clone()
    own.step([shared_batch(World(), number) for number in range(2)], lr=LR)
    losses = []
    for number in range(2):
        batch = shared_batch(World(), number)
        if bank is not None:
            output = module(batch.q.double(), batch.k, bank, None)
            bank = torch.cat([bank, output.key])[-len(bank) :]
        else:
            mixed = [draw_order(0, number, 0, BATCH), torch.tensor(draw_share(0, number))]
            given = mixed if name == "mixed" else [None, None]
            output = module(batch.q.double(), batch.k, TARGETS if name == "supcon" else None, *given)
        losses.append(torch.stack(list(output.losses.values())).sum())
    torch.stack(losses).mean().backward()
    optimizer.step()
    with torch.no_grad():
        for key, average in module.averages.items():
            average.lerp_(module.get_parameter(key), 1 - config.loss.ema)
    assert_states_close(own.module.state_dict(), module.state_dict(), 1e-9, name)
    if bank is not None and own.queue is not None:
        oldest = int(own.queue.pointer)
        torch.testing.assert_close(own.queue.bank.roll(-oldest, 0), bank, rtol=0, atol=1e-12)


def one_step(t: Trainer, world: World, number: int) -> None:
    accumulate = t.config.optim.accumulate
    t.step([shared_batch(world, accumulate * number + i) for i in range(accumulate)], lr=LR)


def held(t: Trainer) -> dict[str, Tensor]:
    """Everything that a trainer has between two steps, and the losses since they were last read."""
    buffers = {f"buffer.{name}": value for name, value in t.module.named_buffers()}
    queue = {} if t.queue is None else {f"queue.{name}": value for name, value in t.queue.state_dict().items()}
    rows = torch.tensor([[row[name] for name in t.module.loss_names] for row in t.history.read()])
    return t.engine.state() | buffers | queue | {"losses": rows}


def from_the_file(world: World, method: str, changes: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """What a trainer has that read the checkpoint of the first step in `folder` and took the second."""
    t = shared_trainer(world, method, **changes)
    saved = Store(folder).latest()
    assert saved is not None and saved.step == 1
    t.restore(saved)
    one_step(t, world, 1)
    return held(t)


def _stopped_and_not(world: World, method: str, changes: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Sketches of what two steps give, which has to be what they give with a checkpoint between them."""
    whole = shared_trainer(world, method, **changes)
    one_step(whole, world, 0)
    checkpoint = whole.checkpoint(1, "data")
    if world.first:
        Store(folder).save_now(checkpoint)
    # Reads the losses of the first step, and has all wait for the file.
    whole.history.read()
    one_step(whole, world, 1)
    expected, actual = held(whole), from_the_file(world, method, changes, folder)
    assert expected.keys() == actual.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, actual[name])]
    assert not different, f"{len(different)} differ: {different[:4]}"
    return {name: sketch(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(engine("ddp", name, slow=name != "simclr") for name in OBJECTIVES),
        engine("zero3", "simclr", slow=True),
    ],
)
def test_a_checkpoint_of_two_processes_goes_on_with_two_and_with_one(
    engine: str, name: str, tmp_path: Path, mixed_as_by_two: None
) -> None:
    """In steps of two micro-batches: with two to the last bit, with one to nine digits where there is float64."""
    exact = engine == "ddp"
    method, changes = case(name, precision="fp64" if exact else "fp32", accumulate=2)
    expected, _ = in_world(2, _stopped_and_not, method, changes | {"engine": engine}, tmp_path)
    actual = {key: sketch(value) for key, value in from_the_file(World(), method, changes, tmp_path).items()}
    if exact:
        assert_states_close(actual, expected, 1e-9, name)
    assert distance(expected, actual, "momentum") < 3e-2


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(engine("auto", name, slow=name != "simclr") for name in OBJECTIVES),
        engine("zero3", "simclr", slow=True),
    ],
)
def test_float16_gradients_are_scaled_and_a_step_that_overflows_is_left_out(engine: str, name: str) -> None:
    assert_gradients_are_scaled(engine, METHODS[name], changes_of(name))
