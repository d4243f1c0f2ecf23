"""The parts of the training objective: modules over the operations, each returning named 0-d tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from fastmoco.distributed.collectives import gather, gather_for_shared_loss
from fastmoco.distributed.world import World
from fastmoco.models.projector import Projector
from fastmoco.ops.batch_contrast import ntxent, supcon
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce_ranked
from fastmoco.ops.mixed_crosscorr import mixed_crosscorr
from fastmoco.ops.pooled_mse import pooled_mse
from fastmoco.ops.precision import no_autocast, wide

# Maps by the stage's number less one; where there are not all four, those that a loss is given.
Stages = Sequence[Tensor] | Mapping[int, Tensor]


class InfoNCE(nn.Module):
    """The contrastive loss of normalised queries and keys (N, D) against a bank (K, D).

    `margin` is subtracted from the similarity of query and key. Returns {"infonce": loss}, and the rank (N,) of each
    key: how many negatives are more similar to its query.
    """

    def __init__(self, temperature: float, margin: float = 0.0) -> None:
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, query: Tensor, key: Tensor, bank: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        loss, rank = infonce_ranked(query, key, bank, temperature=self.temperature, margin=self.margin)
        return {"infonce": loss}, rank


class NTXent(nn.Module):
    """SimCLR's loss of two views' embeddings (N, D), against those of the other images of all processes of `world`.

    Every process gathers them and has the same loss. `margin` is subtracted from the similarity of the two views.
    Returns {"ntxent": loss}, and the rank of each of this process's: first those of view 1, then of view 2.
    """

    names = ("ntxent",)

    def __init__(self, temperature: float, margin: float = 0.0, *, world: World) -> None:
        super().__init__()
        self.temperature, self.margin, self.world = temperature, margin, world

    def forward(self, z1: Tensor, z2: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        loss, rank = ntxent(*gather_views(self.world, z1, z2), temperature=self.temperature, margin=self.margin)
        return {"ntxent": loss}, own_ranks(self.world, rank)


class SupCon(nn.Module):
    """The supervised contrastive loss of two views' embeddings (N, D) and the images' classes (N,) int64, -1 where it
    is unknown, over all processes of `world`, as `NTXent`. Returns {"supcon": loss} and the ranks."""

    names = ("supcon",)

    def __init__(self, temperature: float, *, world: World) -> None:
        super().__init__()
        self.temperature, self.world = temperature, world

    def forward(self, z1: Tensor, z2: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        classes = gather(self.world, targets, kind="classes")
        z1, z2 = gather_views(self.world, z1, z2)
        loss, rank = supcon(z1, z2, classes, temperature=self.temperature)
        return {"supcon": loss}, own_ranks(self.world, rank)


class BarlowTwins(nn.Module):
    """The cross-correlation loss of two views' projections (N, D), and, with a weight `mix`, that of mixed pictures'.

    `scale * (sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2)`, and `scale * off_diagonal * mix` times
    `mixed_crosscorr` (Bandara et al. 2023). C is that of this process's images or, `over_all`, of all of `world`.
    Returns {"barlow": loss} or {"barlow": loss, "mixed": loss}, and the rank (N,) of each image's second view among
    this process's.
    """

    def __init__(self, *, scale: float, off_diagonal: float, mix: float, over_all: bool, world: World) -> None:
        super().__init__()
        self.names = ("barlow", "mixed") if mix else ("barlow",)
        self.scale, self.off_diagonal, self.mix = scale, off_diagonal, mix
        self.world = world if over_all else World()

    def forward(
        self, z1: Tensor, z2: Tensor, mixed: Tensor | None, order: Tensor | None, share: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        # In half precision similarities near 1 would be ties, and look found.
        with torch.no_grad(), no_autocast(z1):
            similarity = normalize(wide(z1), dim=1) @ normalize(wide(z2), dim=1).T
            rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
        if mixed is None:
            z1, z2 = gather_views(self.world, z1, z2)
        else:
            z1, z2, mixed = gather_views(self.world, z1, z2, mixed)
        losses = {"barlow": crosscorr(z1, z2, off_diagonal=self.off_diagonal, scale=self.scale)}
        if mixed is not None:
            assert order is not None and share is not None
            order = gather(self.world, order + self.world.rank * len(order), kind="classes")
            weight = self.scale * self.off_diagonal * self.mix
            losses["mixed"] = weight * mixed_crosscorr(mixed, z1, z2, order, share)
        return losses, rank


def gather_views(world: World, *views: Tensor) -> Iterator[Tensor]:
    """The rows (N, D) of each of `views` from all processes of `world`, (W N, D) each, for a loss that all compute
    alike; one gather, counted as "embeddings"."""
    together = gather_for_shared_loss(world, torch.stack(views, dim=1), kind="embeddings")
    return iter(together.unbind(dim=1))


def own_ranks(world: World, rank: Tensor) -> Tensor:
    """Of the ranks (2 W N,) of both views of all images those of this process, (2 N,)."""
    return rank.view(2, world.size, -1)[:, world.rank].flatten()


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
            means = [adaptive_avg_pool2d(stages[stage], 1).flatten(1) for stages in (query, key)]
            kind = next(projector.parameters()).dtype
            if means[0].dtype != kind and not torch.is_autocast_enabled(means[0].device.type):
                # Of a network in half precision, say, beside projectors in float32.
                means = [mean.to(kind) for mean in means]
            yield projector(*means)
