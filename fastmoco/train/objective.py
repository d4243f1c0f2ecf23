"""The one module that is trained: two views in, named losses out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.losses import InfoNCE, StageBarlow, StageMSE
from fastmoco.models.encoder import Encoder
from fastmoco.ops.precision import wide
from fastmoco.train.config import LossConfig, ModelConfig


class Output(NamedTuple):
    """`losses`: 0-d tensors, weighted as they enter the sum. `query` and `key`: (N, D) normalised, without gradient.

    `rank`: (N,) how many negatives are more similar to a query than its key.
    """

    losses: dict[str, Tensor]
    query: Tensor
    key: Tensor
    rank: Tensor


class MomentumContrast(nn.Module):
    """A query encoder, the key encoder that follows it, and the losses between them.

    Gradients reach the query encoder and the stage losses' projectors, never the key encoder. The key encoder's
    BatchNorm statistics are its own: they come from its forward passes and are not averaged with the query's.
    """

    def __init__(self, model: ModelConfig, loss: LossConfig, *, seed: int) -> None:
        super().__init__()
        self.query, self.key = (
            Encoder(
                model.arch, head=model.head, dim=model.dim, zero_init_residual=model.zero_init_residual, seed=seed
            )
            for _ in range(2)
        )
        self.key.requires_grad_(False)
        self.infonce = InfoNCE(loss.temperature)
        self.stage_loss: nn.Module | None = None
        if loss.method == "mse":
            self.stage_loss = StageMSE(loss.stages, loss.grids, loss.stage_weight)
        elif loss.method == "barlow":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)
                self.stage_loss = StageBarlow(
                    loss.stages,
                    self.query.stage_widths,
                    weight=loss.stage_weight,
                    scale=loss.barlow_scale,
                    off_diagonal=loss.barlow_off_diagonal,
                    projector_width=loss.projector_width,
                )

    @property
    def loss_names(self) -> list[str]:
        """The names of the losses that forward returns, in its order."""
        if isinstance(self.stage_loss, StageMSE):
            return ["infonce", *(f"stage{s}" for s in self.stage_loss.grids)]
        if isinstance(self.stage_loss, StageBarlow):
            return ["infonce", *self.stage_loss.projectors]
        return ["infonce"]

    @property
    def averages(self) -> dict[str, Tensor]:
        """The key encoder's parameters, each by the name of the query encoder's that it is the average of."""
        return {f"query.{name}": parameter for name, parameter in self.key.named_parameters()}

    @property
    def multiplied(self) -> list[str]:
        """Names of the weights that autocast rounds: those of convolutions and linear layers, heads excepted."""
        heads = {id(p) for encoder in (self.query, self.key) for p in encoder.head.parameters()}
        return [
            f"{name}.weight"
            for name, part in self.named_modules()
            if isinstance(part, (nn.Conv2d, nn.Linear)) and id(part.weight) not in heads
        ]

    def forward(self, view_q: Tensor, view_k: Tensor, bank: Tensor) -> Output:
        """Two views (N, 3, H, W) of the same images in [0, 1], and the negatives (K, D), as they were before them."""
        query = self.query(view_q)
        with torch.no_grad():
            key = self.key(view_k)
        q = normalize(wide(query.embedding), dim=1)
        k = normalize(wide(key.embedding), dim=1)
        losses, rank = self.infonce(q, k, bank)
        if self.stage_loss is not None:
            losses |= self.stage_loss(query.stages, key.stages)
        return Output(losses, q.detach(), k, rank)
