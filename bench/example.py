"""lightly's MoCo example: the loop of its documentation, with lightly's parts or with ours under the same names."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastmoco.adapters import lightly as ours
from fastmoco.adapters.accelerated import Accelerated
from fastmoco.train.trainer import Trainer

LOADING = "loading"
# The parts of a step, in their order. What loads in the background is not in `loading`, which is the wait for it.
PARTS = (LOADING, "EMA", "query forward", "key forward", "loss", "backward", "optimiser")
DIM = 128


class Laps:
    """Seconds of each part of the steps so far, by a clock that is read where one ends."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def start(self) -> None:
        """What came before belongs to no part."""
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """All since the last reading was `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


@dataclass(frozen=True)
class Parts:
    """What the example imports: a projection head, the loss with its memory bank, and the moving average."""

    head: Callable[..., nn.Module]
    loss: Callable[..., nn.Module]
    update: Callable[..., None]


OURS = Parts(ours.MoCoProjectionHead, ours.NTXentLoss, ours.update_momentum)


def lightlys() -> Parts:
    """lightly's own. Raises ModuleNotFoundError where it is not installed."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import update_momentum

    return Parts(MoCoProjectionHead, NTXentLoss, update_momentum)


class Example:
    """The example's networks, loss and plain SGD, in float32; with `accelerated`, backbones in our arithmetic.

    arch: torchvision ResNet. bank: keys in the memory bank. momentum: of the moving average. All random starts come
    from torch's global state, in the same order whatever the parts.
    """

    def __init__(
        self,
        arch: str,
        parts: Parts,
        *,
        bank: int,
        temperature: float,
        momentum: float,
        lr: float,
        accelerated: bool = False,
        device: str = "cpu",
    ) -> None:
        # Here, as in bench.paper.
        from torchvision.models import get_model

        resnet = get_model(arch, weights=None)
        width = resnet.fc.in_features
        resnet.fc = nn.Identity()
        self.resnet: nn.Module = resnet
        backbone: nn.Module = Accelerated(resnet) if accelerated else resnet
        self.backbone, self.head = backbone.to(device), parts.head(width, width, DIM).to(device)
        self.backbone_momentum, self.head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        self.criterion = parts.loss(temperature=temperature, memory_bank_size=(bank, DIM)).to(device)
        self.optimizer = torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], lr=lr)
        self._update, self._momentum = parts.update, momentum

    def start_from(self, trainer: Trainer) -> None:
        """Take the weights and the negatives of `trainer`, whose head is MoCo v2's. Not for accelerated backbones."""
        query = trainer.module.query
        head = {f"layers.{name}": value for name, value in query.head.state_dict().items()}
        for backbone, projection in ((self.backbone, self.head), (self.backbone_momentum, self.head_momentum)):
            backbone.load_state_dict(query.backbone.state_dict())
            projection.load_state_dict(head)
        assert trainer.queue is not None
        cast(nn.Module, self.criterion.memory_bank).get_buffer("bank").copy_(trainer.queue.bank)

    def backward(self, x0: Tensor, x1: Tensor, laps: Laps | None = None) -> Tensor:
        """All of a step on two views (N, 3, H, W) but the optimiser's part; the loss, 0-d."""
        end = laps.end if laps else lambda part: None
        self._update(self.backbone, self.backbone_momentum, m=self._momentum)
        self._update(self.head, self.head_momentum, m=self._momentum)
        end("EMA")
        query = self.head(self.backbone(x0).flatten(start_dim=1))
        end("query forward")
        with torch.no_grad():
            key = self.head_momentum(self.backbone_momentum(x1).flatten(start_dim=1))
        end("key forward")
        loss: Tensor = self.criterion(query, key)
        end("loss")
        self.optimizer.zero_grad()
        loss.backward()
        end("backward")
        return loss.detach()

    def step(self, x0: Tensor, x1: Tensor, laps: Laps | None = None) -> Tensor:
        """One step on two views (N, 3, H, W); the loss, 0-d, before it."""
        loss = self.backward(x0, x1, laps)
        self.optimizer.step()
        if laps:
            laps.end("optimiser")
        return loss
