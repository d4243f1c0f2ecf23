"""The one module that is trained: two views in, named losses out. Here what all objectives share, and MoCo's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from fastmoco.distributed.exchange import Exchange
from fastmoco.distributed.world import World
from fastmoco.losses import InfoNCE, StageBarlow, StageMSE, Stages
from fastmoco.models.batch_norms import convert_norms
from fastmoco.models.encoder import Encoder, Features
from fastmoco.ops.library import left_to_torch, watched
from fastmoco.ops.precision import wide
from fastmoco.together import together
from fastmoco.train.config import LossConfig, ModelConfig

# Elements of a view (N, 3, H, W) up to which both encoders are at work at once on a CPU: 32 of 64 px are well below,
# 16 of 224 px, by whose maps the two take the cache from each other, above.
SMALL = 2**20


class Output(NamedTuple):
    """`losses`: 0-d tensors, weighted as they enter the sum. `query`: embeddings (N, D) of the first views, normalised,
    without gradient. `key`: (M, D) normalised, what the queue is to take; none where there is no queue.

    `rank`: (R,) how many negatives are more similar to a view than the one that belongs to it.
    """

    losses: dict[str, Tensor]
    query: Tensor
    key: Tensor
    rank: Tensor


class Objective(nn.Module):
    """What every objective has: the encoder that is kept, `query`, and the loss at its stages, if any.

    `names` are those of its own losses; `queued` says whether it is given negatives. `passes` are the forwards of a
    step through the query encoder and through the key encoder.
    """

    names: tuple[str, ...]
    queued = False
    passes: tuple[int, int]
    query: Encoder
    stage_loss: StageMSE | StageBarlow | None

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """All encoders, the query's first; they begin with the same weights."""
        return (self.query,)

    @property
    def loss_names(self) -> list[str]:
        """The names of the losses that forward returns, in its order."""
        return [*self.names, *(f"stage{s}" for s in self.stage_loss.grids)] if self.stage_loss else [*self.names]

    @property
    def averages(self) -> dict[str, Tensor]:
        """The parameters that follow others by a moving average, each by the name of the one that it follows."""
        return {}

    @property
    def multiplied(self) -> list[str]:
        """Names of the weights that autocast rounds: those of convolutions and linear layers, heads excepted."""
        heads = {id(p) for encoder in self.encoders for p in encoder.head.parameters()}
        return [
            f"{name}.weight"
            for name, part in self.named_modules()
            if isinstance(part, (nn.Conv2d, nn.Linear)) and id(part.weight) not in heads
        ]


def make_encoder(model: ModelConfig, seed: int) -> Encoder:
    """The encoder that `model` describes, with weights drawn by `seed`."""
    return Encoder(model.arch, head=model.head, dim=model.dim, zero_init_residual=model.zero_init_residual, seed=seed)


def make_stage_loss(
    loss: LossConfig, widths: Sequence[int], *, seed: int, world: World
) -> StageMSE | StageBarlow | None:
    """The loss at the stages, of `widths` channels, that `loss` describes; its projectors' weights are drawn by
    `seed`."""
    if loss.stage_loss == "mse":
        return StageMSE(loss.stages, loss.grids, loss.stage_weight)
    if loss.stage_loss == "none":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StageBarlow(
            loss.stages,
            widths,
            weight=loss.stage_weight,
            scale=loss.barlow_scale,
            off_diagonal=loss.barlow_off_diagonal,
            projector_width=loss.projector_width,
            over_all=loss.barlow_correlation == "global",
            world=world,
        )


class MomentumContrast(Objective):
    """A query encoder, the key encoder that follows it, and the losses between them.

    Gradients reach the query encoder and the stage losses' projectors, never the key encoder. The key encoder's
    BatchNorm statistics are its own: they come from its forward passes and are not averaged with the query's.

    Every process of `world` has its part of a micro-batch, of the same size. The mean over the processes of a loss, and
    of its gradients, is that of the micro-batch, but for what --norm and --barlow-correlation leave to each process.
    """

    names = ("infonce",)
    queued = True

    def __init__(self, model: ModelConfig, loss: LossConfig, *, seed: int, world: World | None = None) -> None:
        super().__init__()
        world = world or World()
        self.alone = world.alone
        self.symmetric = loss.symmetric
        self.passes = (2, 2) if loss.symmetric else (1, 1)
        self.key_shuffle = loss.key_shuffle
        self.shuffled_over = world if loss.key_shuffle == "global" else World()
        self.query, self.key = (make_encoder(model, seed) for _ in range(2))
        self.key.requires_grad_(False)
        self.infonce = InfoNCE(loss.temperature, loss.margin)
        self.stage_loss = make_stage_loss(loss, self.query.stage_widths, seed=seed + 1, world=world)
        convert_norms(self, model.norm, groups=model.norm_groups, world=world)

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return self.query, self.key

    @property
    def averages(self) -> dict[str, Tensor]:
        """The key encoder's parameters, each by the name of the query encoder's that it is the average of."""
        return {f"query.{name}": parameter for name, parameter in self.key.named_parameters()}

    def forward(self, view_q: Tensor, view_k: Tensor, bank: Tensor, order: Tensor | None = None) -> Output:
        """Two views (N, 3, H, W) of the same images in [0, 1], and the negatives (K, D), as they were before them.

        `order` (N,) int64, a permutation (distributed/exchange.py's draw_order), is that in which the keys' images are
        shuffled; it is not used where the keys are not. `view_k` is widened to view_q's dtype behind that, so that what
        is sent is as compact as it is given.
        """
        there = self._one_way(view_q, view_k, bank, order)
        if not self.symmetric:
            return there
        # What was widened goes back to its compact dtype without loss.
        back = self._one_way(view_k.to(view_q.dtype), view_q.to(view_k.dtype), bank, order)
        return Output(
            {name: (loss + back.losses[name]) / 2 for name, loss in there.losses.items()},
            there.query,
            # Image after image, so that the keys of many processes, gathered, have the order of one's.
            torch.stack([there.key, back.key], dim=1).flatten(0, 1),
            torch.cat([there.rank, back.rank]),
        )

    def _one_way(self, view_q: Tensor, view_k: Tensor, bank: Tensor, order: Tensor | None) -> Output:
        if self.key_shuffle == "none":
            query, key = self._both(view_q, view_k.to(view_q.dtype))
            embedding: Tensor = key.embedding
            key_stages: Stages = key.stages
        else:
            assert order is not None
            exchange = Exchange(self.shuffled_over, order)
            arriving = exchange.start(view_k)
            # Meanwhile the images are on their way.
            query = self.query(view_q)
            embedding, key_stages = self._keys_elsewhere(exchange, arriving.wait().to(view_q.dtype))
        q = normalize(wide(query.embedding), dim=1)
        k = normalize(wide(embedding), dim=1)
        losses, rank = self.infonce(q, k, bank)
        if self.stage_loss is not None:
            losses |= self.stage_loss(query.stages, key_stages)
        return Output(losses, q.detach(), k, rank)

    def _both(self, view_q: Tensor, view_k: Tensor) -> tuple[Features, Features]:
        """What the encoders make of the views: of small ones on a CPU both at once."""

        def keys() -> Features:
            with torch.no_grad():
                return self.key(view_k)

        small = view_q.device.type == "cpu" and view_q.numel() <= SMALL
        # A tracer, a profiler or a mode sees one thread.
        if small and self.alone and not left_to_torch() and not watched():
            return together(lambda: self.query(view_q), keys)
        return self.query(view_q), keys()

    @torch.no_grad()
    def _keys_elsewhere(self, exchange: Exchange, images: Tensor) -> tuple[Tensor, Stages]:
        """The key encoder's embeddings of this process's images and the pooled maps that the stage loss needs.

        `images` are those that `exchange` brought. Maps are pooled before they go back, which is all that is used of
        them, and together with the embedding, so that both are the same image's.
        """
        key = self.key(images)
        grids = self.stage_loss.grids if self.stage_loss else {}
        pooled = [adaptive_avg_pool2d(wide(key.stages[s - 1]), grid) for s, grid in grids.items()]
        embedding, *maps = exchange.bring_back(key.embedding, *pooled)
        return embedding, {s - 1: value for s, value in zip(grids, maps, strict=True)}
