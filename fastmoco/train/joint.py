"""Objectives of one encoder that both views train: SimCLR, supervised contrastive, Barlow Twins."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.distributed.world import World
from fastmoco.losses import BarlowTwins, NTXent, SupCon
from fastmoco.models.batch_norms import convert_norms
from fastmoco.ops.mixed_crosscorr import mix
from fastmoco.ops.precision import wide
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.objective import Objective, Output, make_encoder, make_stage_loss


def draw_share(seed: int, micro_batch: int) -> float:
    """How much of the first view mixed pictures have, even from 0 to 1: a pure function of its arguments."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5_0A12E], counter=[0, 0, 0, micro_batch]))
    return float(rng.random())


class JointEmbedding(Objective):
    """One encoder, which two views go through one after the other, and the losses between them: gradients reach it by
    both. Processes are as of MomentumContrast."""

    def __init__(self, model: ModelConfig, loss: LossConfig, *, seed: int, world: World | None = None) -> None:
        super().__init__()
        world = world or World()
        self.query = make_encoder(model, seed)
        self.loss = _make_loss(loss, world)
        self.names = self.loss.names
        self.passes = (3 if loss.mix_weight else 2), 0
        self.stage_loss = make_stage_loss(loss, self.query.stage_widths, seed=seed + 1, world=world)
        convert_norms(self, model.norm, groups=model.norm_groups, world=world)

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        targets: Tensor | None = None,
        order: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Output:
        """Two views (N, 3, H, W) of the same images in [0, 1]. SupCon needs their classes `targets` (N,) int64; mixed
        samples the `order` (N,) int64 and the `share`, a 0-d tensor, of ops/mixed_crosscorr.py."""
        view2 = view2.to(view1.dtype)
        first, second = self.query(view1), self.query(view2)
        z1, z2 = first.embedding, second.embedding
        if isinstance(self.loss, SupCon):
            assert targets is not None
            losses, rank = self.loss(z1, z2, targets)
        elif isinstance(self.loss, NTXent):
            losses, rank = self.loss(z1, z2)
        else:
            mixed = None if order is None or share is None else self.query(mix(view1, view2, order, share)).embedding
            losses, rank = self.loss(z1, z2, mixed, order, share)
        if self.stage_loss is not None:
            losses |= self.stage_loss(first.stages, second.stages)
        return Output(losses, normalize(wide(z1.detach()), dim=1), z1.new_empty(0, z1.shape[1]), rank)


def _make_loss(loss: LossConfig, world: World) -> NTXent | SupCon | BarlowTwins:
    if loss.objective == "simclr":
        return NTXent(loss.temperature, loss.margin, world=world)
    if loss.objective == "supcon":
        return SupCon(loss.temperature, world=world)
    return BarlowTwins(
        scale=loss.barlow_scale,
        off_diagonal=loss.barlow_off_diagonal,
        mix=loss.mix_weight,
        over_all=loss.barlow_correlation == "global",
        world=world,
    )
