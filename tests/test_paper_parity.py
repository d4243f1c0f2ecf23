"""fastmoco's training step against the literal transcription of the paper, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.paper import CHEST_GRIDS, Paper, Record
from fastmoco.data.loader import Batch
from fastmoco.data.views import ViewConfig
from fastmoco.distributed.world import World
from fastmoco.train.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.train.trainer import Trainer
from parity import (
    GRADIENT,
    GRADIENT_COSINE,
    LOSS,
    STATE,
    assert_states_close,
    gradient_cosine,
    relative_error,
)

# A queue of some thousands, as with a few dozen rows the loss at a temperature of 0.07 is all but zero; the pointer
# starts near its end, so that the ring wraps inside the second batch.
SEED, BATCH, QUEUE, SIDE, STEPS, WIDTH = 11, 7, 4099, 64, 3, 96
POINTER = QUEUE - 10
METHODS = ["moco", "mse", "barlow"]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def config(method: str, precision: str) -> Config:
    # A momentum far from 1, so that an error in the key encoder shows within three steps.
    return Config(
        recipe="parity",
        data=DataConfig(data=Path()),
        run=RunConfig(out=Path(), seed=SEED, precision=precision, log_every=STEPS),
        views=ViewConfig(size=SIDE, resize=1.0),
        model=ModelConfig(arch="resnet18", dim=24),
        loss=LossConfig(
            method=method,
            queue_size=QUEUE,
            ema=0.9,
            stage_weight=5e-5 if method == "barlow" else 0.25,
            grids=CHEST_GRIDS,
            projector_width=WIDTH,
        ),
        optim=OptimConfig(batch_size=BATCH, lr=0.03),
    )


def perturb_zero_gammas(trainer: Trainer) -> None:
    """Give the zero-initialised gammas values: with zeros, most first gradients are exactly zero."""
    generator = torch.Generator().manual_seed(SEED)
    state = trainer.module.query.state_dict()
    for name, value in state.items():
        if name.endswith("bn2.weight"):
            value.copy_(0.2 + 0.1 * torch.rand(value.shape, generator=generator))
    trainer.module.key.load_state_dict(state)


def torchvision_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace("head.", "fc.").removeprefix("backbone."): value for name, value in values.items()}
    assert len(renamed) == len(values)
    return renamed


def oracle(trainer: Trainer, method: str) -> Paper:
    """The transcription, starting in float64 from where `trainer` is; the queue's rows are given unit length."""
    trainer.queue.bank.copy_(normalize(trainer.queue.bank.double(), dim=1))
    trainer.queue.pointer.fill_(POINTER)
    projectors: list[dict[str, Tensor]] = []
    if method == "barlow":
        projectors = [
            {name: value.double() for name, value in p.state_dict().items()}
            for p in trainer.module.stage_loss.projectors.values()
        ]
    settings = trainer.config
    paper = Paper(
        encoder_state=torchvision_names(
            {name: value.double() for name, value in trainer.module.query.state_dict().items()}
        ),
        queue=trainer.queue.bank.double(),
        projector_states=projectors,
        arch="resnet18",
        m=settings.loss.ema,
        tau=settings.loss.temperature,
        lr=settings.optim.lr,
        stage_loss="none" if method == "moco" else method,
        grids=CHEST_GRIDS,
    )
    paper.pointer = POINTER
    return paper


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    # What bfloat16 can hold exactly, so that every precision is given the same pixels.
    return [
        tuple(torch.rand(BATCH, 3, SIDE, SIDE, generator=generator).bfloat16().double() for _ in range(2))
        for _ in range(STEPS)
    ]


class Spy:
    """Keeps the query's gradients, which the optimiser step clears."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.gradients: dict[str, Tensor] = {}
        self.projector_gradients: dict[str, Tensor] = {}
        self.engine_step = trainer.engine.step
        trainer.engine.step = self.step

    def step(self, lr: float, *, ema: float) -> None:
        self.gradients = torchvision_names(self.below("query."))
        self.projector_gradients = self.below("stage_loss.")
        self.engine_step(lr, ema=ema)

    def below(self, prefix: str) -> dict[str, Tensor]:
        gradients = self.trainer.engine.gradients
        return {n.removeprefix(prefix): g.clone() for n, g in gradients.items() if n.startswith(prefix)}


def our_step(trainer: Trainer, spy: Spy, views: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One of our steps: the key weights it used, and its losses. The gradients are in `spy`."""
    key = torchvision_names({n: p.detach().clone() for n, p in trainer.module.key.named_parameters()})
    q, k = (view.to(memory_format=torch.channels_last) for view in views)
    trainer.step([Batch(q, k, torch.arange(BATCH).numpy())], trainer.config.optim.lr)
    (row,) = trainer.history.read()
    return key, row


def projector_states(record: Record, which: str) -> dict[str, Tensor]:
    return {
        f"projectors.stage{s}.{name}": value
        for s, state in enumerate(getattr(record, which), start=1)
        for name, value in state.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_three_float64_steps_are_the_papers(method: str) -> None:
    trainer = Trainer(config(method, "fp64"), precision="fp64", world=World())
    perturb_zero_gammas(trainer)
    paper, spy = oracle(trainer, method), Spy(trainer)
    for number, views in enumerate(batches(), start=1):
        record = paper.step(*views)
        key, row = our_step(trainer, spy, views)
        for name, expected in record.losses.items():
            actual = row["loss" if name == "total" else name]
            assert actual == pytest.approx(expected.item(), rel=LOSS[torch.float64]), (number, name)
        assert_states_close(spy.gradients, record.gradients, GRADIENT[torch.float64], f"step {number} gradients")
        assert_states_close(key, record.key_parameters, STATE, f"step {number} key weights")
        query = torchvision_names({n: p.detach() for n, p in trainer.module.query.named_parameters()})
        assert_states_close(query, record.query_parameters, STATE, f"step {number} query weights")
        assert relative_error(trainer.queue.bank, record.queue) <= STATE
        assert trainer.queue.pointer.item() == record.pointer
        if method == "barlow":
            gradients = projector_states(record, "projector_gradients")
            what = f"step {number} projector gradients"
            assert_states_close(spy.projector_gradients, gradients, GRADIENT[torch.float64], what)
            weights = {n: p.detach() for n, p in trainer.module.stage_loss.named_parameters()}
            assert_states_close(weights, projector_states(record, "projector_parameters"), STATE, "projector weights")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_first_step_in_lower_precision(method: str, precision: str) -> None:
    dtype = DTYPES[precision]
    trainer = Trainer(config(method, precision), precision=precision, world=World())
    perturb_zero_gammas(trainer)
    paper, spy = oracle(trainer, method), Spy(trainer)
    views = batches()[0]
    record = paper.step(*views)
    _, row = our_step(trainer, spy, views)
    for name, expected in record.losses.items():
        actual = row["loss" if name == "total" else name]
        assert actual == pytest.approx(expected.item(), rel=LOSS[dtype]), name
    assert gradient_cosine(spy.gradients, record.gradients) >= GRADIENT_COSINE[dtype]


def test_the_comparison_can_fail() -> None:
    """An oracle with another momentum is told apart at the second step, as the key weights then differ."""
    trainer = Trainer(config("mse", "fp64"), precision="fp64", world=World())
    perturb_zero_gammas(trainer)
    paper, spy = oracle(trainer, "mse"), Spy(trainer)
    paper.m = 0.901
    first, second = batches()[:2]
    paper.step(*first)
    our_step(trainer, spy, first)
    record = paper.step(*second)
    key, row = our_step(trainer, spy, second)
    with pytest.raises(AssertionError, match="key weights"):
        assert_states_close(key, record.key_parameters, STATE, "key weights")
    assert row["loss"] != pytest.approx(record.losses["total"].item(), rel=LOSS[torch.float64])
