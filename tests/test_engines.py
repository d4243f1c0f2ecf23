"""Several processes train as one would, whatever shares the work out; checkpoints of each go on with any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_steps import (
    NAMES,
    Cases,
    alone,
    assert_gradients_are_scaled,
    compare,
    engine,
    needs_deepspeed,
    trained_in_turn,
)
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.engines.loss_scale import LossScale
from runs import NARROW, shared_batch, shared_trainer
from worlds import in_world

# Whole curves of every one are in test_engines_system.py.
THREE = [engine("ddp"), engine("zero1", slow=True), engine("zero3", slow=True)]
METHODS = ("moco", "mse", "barlow")


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.system) for size in (3, 4))])
def test_processes_are_one_process_to_nine_digits(size: int) -> None:
    """Losses, gradients, weights, momentum, average and queue, on every rank; keys shuffled over all of them."""
    cases: Cases = [
        (method, {"precision": "fp64", "norm": norm, "key_shuffle": "global"})
        for method in METHODS
        for norm in ("frozen", "sync")
    ]
    expected = alone(cases)
    assert all(any(name.startswith("gradient2.") for name in one) for one in expected)
    for actual in in_world(size, trained_in_turn, cases):
        for one, other in zip(expected, actual, strict=True):
            compare(one, other, 1e-9, "gradient")
            assert other["sent.shuffle"] > 0


@pytest.mark.parametrize("engine", [engine("ddp"), engine("zero3", slow=True)])
def test_each_engine_trains_as_one_process(engine: str) -> None:
    """Each method, and micro-batches, whose gradients are summed before they are sent."""
    cases: Cases = [(method, {"precision": "fp32", "norm": "sync"}) for method in METHODS]
    cases.append(("mse", {"precision": "fp32", "norm": "sync", "accumulate": 2}))
    expected = alone(cases)
    shared = [(method, changes | {"engine": engine}) for method, changes in cases]
    results = in_world(2, trained_in_turn, shared)
    for actual in results:
        for one, other in zip(expected, actual, strict=True):
            # In float32 single ReLUs flip, and the steps after follow; a wrong factor would be worth far more. Whole
            # curves are held to what rounding does in test_engines_system.py, and every digit in float64 above.
            compare(one, other, 3e-2)
            assert torch.allclose(other["loss.0"], one["loss.0"], rtol=1e-5, atol=1e-6)
    for here, there in zip(*results, strict=True):
        # What the ranks have they have alike to the last bit.
        for name, value in here.items():
            assert name.startswith("sent.") or torch.equal(value, there[name]), name
    if engine == "ddp":
        _, once, _, twice = results[0]
        assert twice["sent.gradients"] == once["sent.gradients"] > 0
        assert twice["sent.keys"] == 2 * once["sent.keys"] > 0


def _after_checkpoint(world: World, engine: str, saved: Checkpoint | None, precision: str) -> Checkpoint | None:
    # In bfloat16 of as many channels as there are in earnest: of fewer, roundings even out less.
    arch = "resnet18" if precision == "bf16" else NARROW
    t = shared_trainer(world, "barlow", engine=engine, precision=precision, norm="sync", arch=arch)
    if saved is not None:
        t.restore(saved)
    t.step([shared_batch(world, 0 if saved is None else 1)], lr=0.05)
    encoder = t.query_encoder()
    checkpoint = t.checkpoint(1, "images")
    if not world.first:
        assert not checkpoint.tensors
        return None
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, checkpoint.tensors[f"module.query.{name}"]), name
    # Tensors of their own: with one that is a part of a larger one the whole of that would be handed over, each time.
    return checkpoint.copy()


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        *(engine(name, "fp32", slow=name != "zero1") for name in NAMES),
        engine("zero3", "bf16", slow=True),
    ],
)
def test_a_checkpoint_of_any_engine_goes_on_with_any_other(engine: str, precision: str) -> None:
    """Written by one process and by three, read by three and by one: each time as if nothing had changed hands."""
    first = _after_checkpoint(World(), "auto", None, precision)
    assert first is not None
    expected = _after_checkpoint(World(), "auto", first, precision)
    shared, *_ = in_world(3, _after_checkpoint, engine, first, precision)
    assert expected is not None and shared is not None
    back = _after_checkpoint(World(), "auto", shared, precision)
    again, *_ = in_world(3, _after_checkpoint, engine, shared, precision)
    assert back is not None and again is not None
    tolerance = 1e-2 if precision == "fp32" else 5e-2
    for one, other in ((expected, shared), (back, again)):
        assert one.tensors.keys() == other.tensors.keys()
        for name, value in one.tensors.items():
            if not name.startswith("rng."):
                error = (value.double() - other.tensors[name].double()).abs().max().item()
                assert error <= tolerance * max(1.0, value.double().abs().max().item()), f"{name}: {error}"


def _read_back(world: World, engine: str, saved: Checkpoint) -> dict[str, Tensor]:
    t = shared_trainer(world, "mse", engine=engine, seed=5)
    t.restore(saved)
    return {name: value.clone() for name, value in t.engine.state().items()}


@pytest.mark.parametrize("engine", THREE)
def test_what_is_read_is_kept_bit_for_bit(engine: str) -> None:
    t = shared_trainer(World(), "mse")
    t.step([shared_batch(World(), 0)], lr=0.05)
    saved = t.checkpoint(1, "images")
    for state in in_world(3, _read_back, engine, saved):
        assert {"module", "momentum"} == {name.split(".")[0] for name in state}
        for name, value in state.items():
            assert torch.equal(value, saved.tensors[name]), name


def _one_bad_rank(world: World, engine: str) -> tuple[bool, list[bool]]:
    t = shared_trainer(world, "mse", engine=engine)
    t.step([shared_batch(world, 0)], lr=0.05)
    before = {name: value.clone() for name, value in t.engine.state().items()}
    broken = shared_batch(world, 1)
    if world.rank == 1:
        broken.q[0, 0, 0, 0] = float("nan")
    t.step([broken], lr=0.05)
    t.step([shared_batch(world, 2)], lr=0.05)
    after = t.engine.state()
    trained = [name for name in before if name.startswith(("module.query", "momentum"))]
    same = all(torch.equal(before[name], after[name]) for name in trained)
    return same, [bool(np.isfinite(row["infonce"])) for row in t.history.read()]


@pytest.mark.parametrize("engine", [engine(name, slow=name in ("zero0", "zero2")) for name in NAMES])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_at_that_step(engine: str) -> None:
    for same, finite in in_world(2, _one_bad_rank, engine):
        assert same
        assert finite == [True, False, True]


@pytest.mark.parametrize("engine", ["auto", *(engine(name, slow=True) for name in ("ddp", "zero1", "zero3"))])
def test_float16_gradients_are_scaled_and_a_step_that_overflows_is_left_out(engine: str) -> None:
    assert_gradients_are_scaled(engine, "moco", {})


def test_the_loss_scale_grows_after_enough_good_steps() -> None:
    scale = LossScale(torch.device("cpu"))
    first = scale.scale.item()
    for _ in range(2000):
        assert scale.scale.item() == first
        scale.update(torch.zeros(()))
    assert scale.scale.item() == 2 * first
    scale.update(torch.ones(()))
    assert scale.scale.item() == first and scale.good.item() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "ddp"}, "there is one: start it with torchrun"),
        ({"engine": "zero3"}, "there is one: start it with torchrun"),
    ],
)
def test_an_engine_for_many_refuses_one_process(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shared_trainer(World(), "mse", **changes)


def _refused(world: World, changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        shared_trainer(world, "mse", **changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "single"}, "cannot join 2 processes"),
        pytest.param({"engine": "zero1", "precision": "fp64"}, "no --precision fp64", marks=needs_deepspeed),
        pytest.param({"engine": "zero1", "optimizer": "lars"}, "lars needs whole weights", marks=needs_deepspeed),
    ],
)
def test_what_does_not_go_together_is_refused_on_every_rank(changes: dict[str, Any], message: str) -> None:
    assert all(message in said for said in in_world(2, _refused, changes))
