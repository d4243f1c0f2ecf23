"""The parts of the training objective: modules over the operations, each returning named 0-d tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fastmoco.models.projector import Projector
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce_ranked
from fastmoco.ops.pooled_mse import pooled_mse

Stages = Sequence[Tensor]


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
    ) -> None:
        super().__init__()
        self.projectors = nn.ModuleDict({f"stage{s}": Projector(widths[s - 1], projector_width) for s in stages})
        self.weight = weight
        self.scale = scale
        self.off_diagonal = off_diagonal

    def forward(self, query: Stages, key: Stages) -> dict[str, Tensor]:
        # One call for all stages: their projections share a width.
        z1, z2 = (torch.stack(side) for side in zip(*self._projections(query, key), strict=True))
        losses = self.weight * crosscorr(z1, z2, off_diagonal=self.off_diagonal, scale=self.scale)
        return dict(zip(self.projectors, losses.unbind(), strict=True))

    def _projections(self, query: Stages, key: Stages) -> Iterator[tuple[Tensor, ...]]:
        """For each stage the projections of both views, (N, D) each."""
        for name, projector in self.projectors.items():
            stage = int(name.removeprefix("stage")) - 1
            yield projector(*(adaptive_avg_pool2d(stages[stage], 1).flatten(1) for stages in (query, key)))
