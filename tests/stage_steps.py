"""A step with StageLosses in a loop of lightly's and in a LightningModule, for any network, beside losses by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmoco.adapters.stages import StageLosses

lightning: Any = pytest.importorskip("pytorch_lightning", reason="PyTorch Lightning is not installed")
losses: Any = pytest.importorskip("lightly.loss", reason="lightly is not installed")
parts: Any = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
tools: Any = pytest.importorskip("lightly.models.utils", reason="lightly is not installed")

# What a network's stages give for images, in their order, found otherwise than by hooks: (N, C, H, W) or (N, L, C).
Capture = Callable[[nn.Module, Tensor], Sequence[Tensor]]

WEIGHT = 0.5


def views(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    first, second = torch.rand(2, 4, 3, size, size, generator=generator)
    return first, second


def by_hand(capture: Capture, model: nn.Module, key_model: nn.Module, size: int) -> Tensor:
    """The loss of every stage, (stages,)."""
    x0, x1 = views(size)
    with torch.no_grad():
        keys = capture(key_model, x1)
    return WEIGHT * torch.stack(
        [(_means(a) - _means(b)).square().mean() for a, b in zip(capture(model, x0), keys, strict=True)]
    )


def _means(output: Tensor) -> Tensor:
    return output.mean((2, 3) if output.ndim == 4 else 1)


def in_lightlys_loop(
    model: nn.Module, stages: Sequence[str], capture: Capture, *, size: int, channels_last: bool = False
) -> None:
    """Stage losses and their gradients are those by hand, and the step trains the stages and no averages."""
    key_model = copy.deepcopy(model)
    tools.deactivate_requires_grad(key_model)
    stage_losses = StageLosses(model, key_model, stages=stages, weight=WEIGHT, channels_last=channels_last)
    x0, x1 = views(size)
    width = model(x0).shape[1]
    head = parts.MoCoProjectionHead(width, 16, 8)
    key_head = copy.deepcopy(head)
    criterion = losses.NTXentLoss(temperature=0.2, memory_bank_size=(16, 8))
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    tools.update_momentum(model, key_model, m=0.9)
    tools.update_momentum(head, key_head, m=0.9)
    query = head(model(x0).flatten(1))
    with torch.no_grad():
        key = key_head(key_model(x1).flatten(1))
    own = stage_losses()
    expected = by_hand(capture, model, key_model, size)
    _close(stage_losses, stages, expected)
    weights = {f"{stage}.{name}": w for stage in stages for name, w in model.get_submodule(stage).named_parameters()}
    found, wanted = (
        torch.autograd.grad(loss, [*weights.values()], retain_graph=True) for loss in (own, expected.sum())
    )
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for name, a, b in zip(weights, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale, msg=lambda said, name=name: f"{name}: {said}")
    for stage in stages:
        assert any(a.abs().max() > 0 for name, a in zip(weights, found, strict=True) if name.startswith(f"{stage}."))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    (criterion(query, key) + own).backward()
    optimizer.step()
    for stage in stages:
        moved = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
        assert any(name.startswith(f"{stage}.") for name in moved), stage
    assert all(weight.grad is None for weight in key_model.parameters())


class Module(lightning.LightningModule):
    """A network and its average under StageLosses alone, whose parts of every step are kept."""

    def __init__(self, model: nn.Module, stages: Sequence[str], **options: Any) -> None:
        super().__init__()
        self.backbone, self.backbone_momentum = model, copy.deepcopy(model)
        self.stage_losses = StageLosses(self.backbone, self.backbone_momentum, stages=stages, **options)
        self.found: list[dict[str, Tensor]] = []

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        self.backbone(batch[0])
        with torch.no_grad():
            self.backbone_momentum(batch[1])
        loss = self.stage_losses()
        self.found.append(self.stage_losses.losses)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, size: int, steps: int = 2, **options: Any) -> Any:
    """Train on the same two views, with averages that move; the trainer."""
    from fastmoco.adapters.lightning import MomentumCallback

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        enable_checkpointing=False, callbacks=[MomentumCallback({"backbone": "backbone_momentum"}, 0.5)], **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader([views(size)] * steps, batch_size=None))
    return trainer


def in_lightning(
    model: nn.Module, stages: Sequence[str], capture: Capture, *, size: int, channels_last: bool = False
) -> None:
    """The losses of two steps are those by hand of the weights that they began with."""
    module = Module(model, stages, weight=WEIGHT, channels_last=channels_last)
    first = copy.deepcopy(model)
    fit(module, size)
    expected = by_hand(capture, first, first, size)
    assert len(module.found) == 2
    for number, stage in enumerate(stages):
        torch.testing.assert_close(module.found[0][stage], expected[number].detach(), rtol=1e-4, atol=1e-7)
        assert module.found[1][stage].isfinite() and not torch.equal(module.found[1][stage], module.found[0][stage])


def _close(stage_losses: StageLosses, stages: Sequence[str], expected: Tensor) -> None:
    assert [*stage_losses.losses] == list(stages)
    for number, found in enumerate(stage_losses.losses.values()):
        assert found.isfinite()
        torch.testing.assert_close(found, expected[number].detach(), rtol=1e-4, atol=1e-7)
