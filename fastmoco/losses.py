"""The parts of the training objective: modules over the operations, each returning named 0-d tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fastmoco.distributed.collectives import gather_for_shared_loss
from fastmoco.distributed.world import World
from fastmoco.models.projector import Projector
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce_ranked
from fastmoco.ops.pooled_mse import pooled_mse

# Maps by the stage's number less one; where there are not all four, those that a loss is given.
Stages = Sequence[Tensor] | Mapping[int, Tensor]


class InfoNCE(nn.Module):
    """The contrastive loss of normalised queries and keys (N, D) against a bank (K, D).

    Returns {"infonce": loss}, and the rank (N,) of each key: how many negatives are more similar to its query.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, query: Tensor, key: Tensor, bank: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        loss, rank = infonce_ranked(query, key, bank, temperature=self.temperature)
        return {"infonce": loss}, rank


class StageMSE(nn.Module):
    """`weight` times the mean squared error of the two views' pooled maps, for each of `stages` (numbered from 1).

    `grids` gives, for all four stages, the side of the grid that a map is average-pooled to; the keys' maps may be
    pooled to it already. Returns {"stage1": loss, ...}, weighted as they enter the sum.
    """

    def __init__(self, stages: Sequence[int], grids: Sequence[int], weight: float) -> None:
        super().__init__()
        self.grids = {stage: grids[stage - 1] for stage in stages}
        self.weight = weight

    def forward(self, query: Stages, key: Stages) -> dict[str, Tensor]:
        return {
            f"stage{s}": self.weight * pooled_mse(query[s - 1], key[s - 1], grid=grid) for s, grid in self.grids.items()
        }


class StageBarlow(nn.Module):
    """`weight` times the cross-correlation loss of the two views' projections, for each of `stages` (from 1).

    Each map is averaged to (N, C) and projected by the stage's own projector, which both views go through and both
    train. Returns {"stage1": loss, ...}, weighted as they enter the sum. `widths` are the four stages' channels.

    The correlation is that of this process's images, or, `over_all`, of those of all processes of `world`: each then
    gathers the projections and has the same losses.
    """

    def __init__(
        self,
        stages: Sequence[int],
        widths: Sequence[int],
        *,
        weight: float,
        scale: float,
        off_diagonal: float,
        projector_width: int,
        over_all: bool = False,
        world: World | None = None,
    ) -> None:
        super().__init__()
        # Stage s's map is pooled to so many places a side.
        self.grids = dict.fromkeys(stages, 1)
        self.projectors = nn.ModuleDict({f"stage{s}": Projector(widths[s - 1], projector_width) for s in stages})
        self.weight = weight
        self.scale = scale
        self.off_diagonal = off_diagonal
        self.world = world if over_all and world is not None else World()

    def forward(self, query: Stages, key: Stages) -> dict[str, Tensor]:
        # One call for all stages, and one gather for all stages and both views: their projections share a width.
        own = torch.stack([z for views in self._projections(query, key) for z in views], dim=1)
        z = gather_for_shared_loss(self.world, own, kind="projections").transpose(0, 1)
        z1, z2 = z[0::2], z[1::2]
        losses = self.weight * crosscorr(z1, z2, off_diagonal=self.off_diagonal, scale=self.scale)
        return dict(zip(self.projectors, losses.unbind(), strict=True))

    def _projections(self, query: Stages, key: Stages) -> Iterator[tuple[Tensor, ...]]:
        """For each stage the projections of both views, (N, D) each."""
        for name, projector in self.projectors.items():
            stage = int(name.removeprefix("stage")) - 1
            yield projector(*(adaptive_avg_pool2d(stages[stage], 1).flatten(1) for stages in (query, key)))
