"""MomentumCallback beside loops written by hand, and PairLoader as Lightning goes over it."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from fastmoco.adapters import lightly as ours
from fastmoco.adapters.loader import PairLoader
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from runs import draw_images

lightning: Any = pytest.importorskip("pytorch_lightning", reason="PyTorch Lightning is not installed")
theirs = pytest.importorskip("lightly.models.utils", reason="lightly is not installed")

from fastmoco.adapters import lightning as adapter  # noqa: E402
from fastmoco.adapters.lightning import MomentumCallback  # noqa: E402

PAIRS = {"backbone": "backbone_momentum", "head": "net.head"}


class Pairs(lightning.LightningModule):
    """Two networks of an odd width, their averages, the keys of every batch, and what a batch is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3)
        self.backbone_momentum = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        self.net = nn.ModuleDict({"head": nn.Linear(5, 3)})
        self.keys: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        batch = batch.to(self.head.weight.dtype)
        with torch.no_grad():
            key = self.net["head"](self.backbone_momentum(batch[:, 1]))
        self.keys.append(key)
        return mse_loss(self.head(self.backbone(batch[:, 0])), key + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.backbone_momentum), (self.head, self.net["head"])]


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(4, 2, 7, generator=generator) for _ in range(count)]


def fit(model: Pairs, *callbacks: Any, resume: Path | None = None, epochs: int = 2, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=epochs,
        callbacks=list(callbacks), **({"enable_checkpointing": False} | options),
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches(), batch_size=None), ckpt_path=resume)
    return trainer


def by_hand(
    model: Pairs, update: Callable[..., None], momenta: list[float], *, accumulate: int = 1, epochs: int = 2
) -> None:
    """The same steps in plain PyTorch, where the averages move as a step begins, and once more at the end."""
    for network, average in model.pairs():
        average.load_state_dict(network.state_dict())
        average.requires_grad_(False)
    optimizer = model.configure_optimizers()
    left = iter(momenta)
    stepped = False
    for _ in range(epochs):
        for number, batch in enumerate(batches(), start=1):
            if stepped:
                momentum = next(left)
                for network, average in model.pairs():
                    update(network, average, momentum)
            whole = number % accumulate == 0 or number == len(batches())
            (model.training_step(batch, number) / accumulate).backward()
            if whole:
                optimizer.step()
                optimizer.zero_grad()
            stepped = whole
    momentum = next(left)
    for network, average in model.pairs():
        update(network, average, momentum)
    assert next(left, None) is None


def same(a: Pairs, b: Pairs, **tolerance: float) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **({"rtol": 0.0, "atol": 0.0} | tolerance))
    torch.testing.assert_close(a.keys, b.keys, **({"rtol": 0.0, "atol": 0.0} | tolerance))


@pytest.mark.parametrize("library", ["ours", "theirs"])
def test_keys_and_weights_are_those_of_a_loop_that_moves_first(library: str) -> None:
    model, expected = Pairs(), Pairs()
    if library == "theirs":
        # Their average rounds otherwise, which ten steps make much of.
        model, expected = model.double(), expected.double()
    fit(model, MomentumCallback(PAIRS, 0.9))
    by_hand(expected, {"ours": ours, "theirs": theirs}[library].update_momentum, [0.9] * 10)
    # Not of a step that the average did not follow, nor of one that it followed to the end.
    assert not torch.equal(model.net["head"].weight, model.head.weight)
    same(model, expected, **({} if library == "ours" else {"rtol": 1e-9, "atol": 1e-12}))


def test_accumulated_gradients_move_once() -> None:
    model, expected = Pairs(), Pairs()
    # Steps after batches 2, 4 and, as the epoch ends, 5.
    fit(model, MomentumCallback([*PAIRS.items()], 0.8), accumulate_grad_batches=2)
    by_hand(expected, ours.update_momentum, [0.8] * 6, accumulate=2)
    same(model, expected)


class Taus(lightning.Callback):
    def __init__(self, callback: MomentumCallback) -> None:
        self.callback, self.found = callback, list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(self.callback.updater.cur_tau)


def test_momentum_rises_over_the_run() -> None:
    model, expected, callback = Pairs(), Pairs(), MomentumCallback(PAIRS, 0.7, 0.95)
    taus = Taus(callback)
    fit(model, callback, taus)
    momenta = [0.95 - 0.25 * (math.cos(math.pi * step / 10) + 1) / 2 for step in range(10)]
    assert momenta[0] == pytest.approx(0.7) and taus.found == pytest.approx(momenta, abs=1e-12)
    by_hand(expected, ours.update_momentum, taus.found)
    same(model, expected)


class Saves(lightning.Callback):
    """Writes a checkpoint as batch `batch` of an epoch ends: before the averages have moved, where it comes first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 3 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, place: str) -> None:
    undisturbed, file = Pairs(), tmp_path / "run.ckpt"
    callbacks = [MomentumCallback(PAIRS, 0.6, 1.0), Saves(file)]
    # Five batches make three steps: the checkpoint is the first epoch's last.
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "epochs": 3}
    fit(undisturbed, *(reversed(callbacks) if place == "before" else callbacks), **options)
    saved = torch.load(file, weights_only=True)
    (state,) = saved["callbacks"].values()
    assert state == {"followed": 2 if place == "before" else 3}
    resumed = Pairs()
    trainer = fit(resumed, MomentumCallback(PAIRS, 0.6, 1.0), resume=file, **options)
    assert trainer.global_step == 9 and len(resumed.keys) == 10
    resumed.keys = undisturbed.keys[:5] + resumed.keys
    same(resumed, undisturbed)


def test_start_and_buffers() -> None:
    copied, kept = Pairs(), Pairs()
    begun = copy.deepcopy(kept)
    with torch.no_grad():
        copied.backbone[1].running_mean += 1
    callback = MomentumCallback(PAIRS, 1.0, buffers="copy")
    before = copy.deepcopy(copied.backbone.state_dict())
    trainer = fit(copied, callback)
    for name, value in copied.backbone_momentum.named_parameters():
        assert torch.equal(value, before[name]) and not value.requires_grad
    assert torch.equal(copied.backbone_momentum[1].running_mean, copied.backbone[1].running_mean)
    assert all(value.requires_grad for value in copied.backbone.parameters())
    # Fitting goes on: the averages do not begin again.
    trainer.fit_loop.max_epochs = 3
    trainer.fit(copied, DataLoader(batches(), batch_size=None))
    assert trainer.global_step == 15 and torch.equal(copied.backbone_momentum[0].weight, before["0.weight"])
    fit(kept, MomentumCallback(PAIRS, 1.0, start="keep"))
    for (name, value), other in zip(
        kept.backbone_momentum.named_parameters(), begun.backbone_momentum.parameters(), strict=True
    ):
        assert torch.equal(value, other) and not value.requires_grad, name
    # BatchNorm's are its own: those of its batches.
    assert not torch.equal(kept.backbone_momentum[1].running_mean, kept.backbone[1].running_mean)


def test_two_callbacks_keep_their_states_apart(tmp_path: Path) -> None:
    parts = [MomentumCallback({name: average}, 0.9) for name, average in PAIRS.items()]
    fit(Pairs(), *parts, Saves(tmp_path / "run.ckpt"))
    states = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert sorted(states) == sorted(part.state_key for part in parts) and len(states) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": {}}, "at least one pair"),
        ({"momentum": 0.9, "final_momentum": 0.8}, "0.9 and 0.8"),
        ({"momentum": 1.1}, "1.1 and 1.1"),
        ({"start": "zero"}, "copy or keep, not 'zero' and 'keep'"),
        ({"pairs": {"backbone": "backbone_momntum"}}, "no part 'backbone_momntum'; it has backbone_momentum"),
        ({"pairs": {"haed": "head"}}, "no part 'haed'; it has head"),
        ({"pairs": {"backbone": "head"}}, "head is no copy of backbone: 2 parameters, not 4"),
        ({"pairs": {"backbone.0": "head"}}, r"weight is \(3, 5\), not \(5, 7\)"),
        ({"pairs": {"backbone": "backbone"}}, "shares parameters with backbone"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit(Pairs(), MomentumCallback(**({"pairs": PAIRS} | options)))


def test_a_rise_needs_an_end() -> None:
    with pytest.raises(UserError, match="max_epochs or max_steps"):
        fit(Pairs(), MomentumCallback(PAIRS, 0.9, 1.0), epochs=-1, max_time="00:00:10:00")


def test_lightning_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(MomentumCallback, lightning.Callback)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(UserError, match="pip install pytorch-lightning"):
        adapter._callback_class()


class Views(lightning.LightningModule):
    """What a PairLoader gives, with the epoch that Lightning is in."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.loader = PairLoader(
            folder, views=ViewConfig(size=8, crop_scale=(0.5, 1.0)), batch_size=4, loader="pillow", workers=0
        )
        self.layer, self.seen = nn.Linear(3, 1), list[tuple[int, list[str], float]]()

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x0, _), _, names = batch
        self.seen.append((self.current_epoch, names, float(x0.double().sum())))
        return self.layer(x0.mean((2, 3))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> PairLoader:
        return self.loader


@pytest.mark.parametrize("limit", [None, 2])
def test_a_pair_loader_goes_on_where_lightning_was(tmp_path: Path, limit: int | None) -> None:
    draw_images(tmp_path, 14)
    options: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": limit, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    files = lightning.callbacks.ModelCheckpoint(tmp_path / "runs", "{step}", every_n_train_steps=1, save_top_k=-1)
    lightning.Trainer(**options, callbacks=[files]).fit(whole := Views(tmp_path))
    plain = Views(tmp_path).loader
    expected = [(epoch, names, float(views[0].double().sum())) for epoch in range(3) for views, _, names in plain]
    assert whole.seen == [row for place, row in enumerate(expected) if limit is None or place % 3 < limit]
    for step in (1, 2, 3, 4):
        resumed = Views(tmp_path)
        trainer = lightning.Trainer(**options, enable_checkpointing=False)
        trainer.fit(resumed, ckpt_path=tmp_path / "runs" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], step
