"""LARS: its formula, what it leaves alone, and what stops it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trainer import batch, before_step, trainer, weights
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.train.config import OptimConfig
from fastmoco.train.lars import lars_update_
from fastmoco.train.trainer import Trainer
from runs import NoSync, references_only

SETTINGS: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "trust": 1e-3}
SHAPES = [(4, 3, 3, 3), (4,), (5, 4), (5,), (2, 2)]


def plain_step(
    p: Tensor, g: Tensor, b: Tensor, *, lr: float, momentum: float, weight_decay: float, trust: float
) -> None:
    """The formula for one tensor, with the host's numbers."""
    if p.ndim > 1:
        g = g + weight_decay * p
        length, move = p.square().sum().sqrt().item(), g.square().sum().sqrt().item()
        g = g * (trust * length / move if length > 0 and move > 0 else 1.0)
    b.copy_(momentum * b + g)
    p.sub_(lr * b)


def lists(seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients and momenta of zero; the last weight is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    p, g = ([torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES] for _ in range(2))
    p[-1].zero_()
    return p, g, [torch.zeros_like(x) for x in p]


@pytest.mark.parametrize("changes", [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"trust": 0.02}])
def test_each_tensor_moves_as_the_formula_says(changes: dict[str, float]) -> None:
    settings = SETTINGS | changes
    p, _, b = lists()
    expected, _, momenta = lists()
    for step in range(4):
        _, g, _ = lists(seed=step + 1)
        g[2].zero_()
        kept = [x.clone() for x in g]
        lars_update_(p, g, b if settings["momentum"] else [], **settings, blocked=torch.zeros(()))
        assert all(torch.equal(x, y) for x, y in zip(g, kept, strict=True)), "gradients are read only"
        for x, y, z in zip(expected, g, momenta, strict=True):
            plain_step(x, y, z, **settings)
        pairs = list(zip(p, expected, strict=True))
        if settings["momentum"]:
            pairs += zip(b, momenta, strict=True)
        assert all(torch.allclose(mine, other, rtol=1e-13, atol=1e-15) for mine, other in pairs)


def test_biases_take_neither_decay_nor_factor() -> None:
    p, g, b = lists()
    before = [x.clone() for x in p]
    lars_update_(p, g, b, **SETTINGS, blocked=torch.zeros(()))
    for i in (1, 3):
        assert torch.allclose(p[i], before[i] - SETTINGS["lr"] * g[i], rtol=1e-14, atol=0)
    # What it is for: the step of a weight is trust * lr of its length, however large the gradient.
    for i in (0, 2):
        assert (p[i] - before[i]).norm() / before[i].norm() == pytest.approx(SETTINGS["trust"] * SETTINGS["lr"])


def test_nothing_moves_while_blocked() -> None:
    p, g, b = lists()
    lars_update_(p, g, b, **SETTINGS, blocked=torch.zeros(()))
    before = [x.clone() for x in (*p, *b)]
    g[0][0] = float("nan")
    g[1][0] = float("inf")
    lars_update_(p, g, b, **SETTINGS, blocked=torch.ones(()))
    assert all(torch.equal(x, y) for x, y in zip((*p, *b), before, strict=True))


def lars(method: str = "mse", **changes: Any) -> Trainer:
    return trainer(method, **{"optimizer": "lars", "log_every": 9} | changes)


@pytest.mark.parametrize(("method", "precision", "accumulate"), [("mse", "bf16", 1), ("barlow", "fp32", 2)])
def test_a_step_does_not_wait_for_the_device(
    method: str, precision: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    references_only(monkeypatch)
    t = lars(method, precision=precision, accumulate=accumulate)
    with NoSync():
        t.step([batch(i) for i in range(accumulate)], lr=0.1)
    assert len(t.history.read()) == 1


def test_a_trainers_step_is_the_formula_and_then_the_average() -> None:
    t = lars("barlow", precision="fp64", sgd_momentum=0.8, weight_decay=1e-3)
    expected = {name: p.detach().clone() for name, p in t.engine.trainable.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    followers = {name: p.clone() for name, p in t.module.key.named_parameters()}

    def mirror() -> None:
        for name, p in expected.items():
            gradient = t.engine.trainable[name].grad
            assert gradient is not None
            plain_step(p, gradient, momenta[name], lr=0.2, momentum=0.8, weight_decay=1e-3, trust=0.001)

    before_step(t, mirror)
    m = t.config.loss.ema
    for i in range(3):
        t.step([batch(i)], lr=0.2)
        for name, p in expected.items():
            assert torch.allclose(t.engine.trainable[name], p, rtol=1e-12, atol=1e-14), name
            assert torch.allclose(t.engine.update.buffers[name], momenta[name], rtol=1e-10, atol=1e-13), name
        for name, follower in followers.items():
            followers[name] = m * follower + (1 - m) * expected[f"query.{name}"]
            assert torch.allclose(t.module.key.get_parameter(name), followers[name], rtol=1e-12, atol=1e-14), name


def test_a_non_finite_loss_stops_it() -> None:
    t = lars()
    t.step([batch(0)], lr=0.1)
    before = {name: p.clone() for name, p in t.engine.trainable.items()}
    momenta = {name: b.clone() for name, b in t.engine.update.buffers.items()}
    broken = batch(1)
    broken.q[0, 0, 0, 0] = float("nan")
    t.step([broken], lr=0.1)
    t.step([batch(2)], lr=0.1)
    assert all(torch.equal(p, before[name]) for name, p in t.engine.trainable.items())
    assert all(torch.equal(b, momenta[name]) for name, b in t.engine.update.buffers.items())


def test_copies_and_shadows_follow_in_bfloat16() -> None:
    t = lars("moco", precision="bf16")
    for i in range(2):
        t.step([batch(i, 8)], lr=5.0)
    held = weights(t)
    assert t.engine.copies.by_name
    for name, copy in t.engine.copies.by_name.items():
        assert torch.equal(copy, held[name].bfloat16()), name
    fresh = trainer("moco", precision="bf16").module.state_dict()
    name = "query.backbone.layer1.0.conv1.weight"
    assert not torch.equal(held[name].bfloat16(), fresh[name].bfloat16()), "the copy has moved"


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    whole = lars("barlow")
    for step in range(2):
        whole.step([batch(step)], lr=0.1)
    saved = whole.checkpoint(2, "images")
    assert {n for n in saved.tensors if n.startswith("momentum.")} == {f"momentum.{n}" for n in whole.engine.trainable}
    other = lars("barlow", seed=7)
    other.restore(saved)
    for t in (whole, other):
        t.step([batch(2)], lr=0.1)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(other).items())


def test_a_negative_trust_is_refused() -> None:
    with pytest.raises(UserError, match="--lars-trust must be 0 or more, not -1"):
        OptimConfig(lars_trust=-1)
