"""One process of `bench.engines`: trains on real images and writes down the losses of every step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from bench.command import start
from fastmoco.allocator import freed_memory_kept
from fastmoco.data.loader import Batch, make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from fastmoco.distributed.launch import joined
from fastmoco.distributed.world import World
from fastmoco.models.norm import FusedBatchNorm2d
from fastmoco.train.config import Config
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer

METHODS = ("moco", "mse", "barlow")
ENGINES: dict[str, dict[str, Any]] = {
    "auto": {"engine": "auto"},
    "ddp": {"engine": "ddp"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero": stage} for stage in range(4)},
}


@dataclass(kw_only=True)
class Setting:
    """What is trained, alike in every run."""

    data: Path
    """Folder of images."""
    steps: int = 30
    """Steps of each run."""
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """Encoder."""
    size: int = 32
    """Side of the images, pixels."""
    batch_size: int = 16
    """Images a step, of all processes together."""
    norm: Literal["sync", "frozen"] = "sync"
    """Normalisation: over all processes, or by statistics that do not change."""
    lr: float = 0.03
    """Learning rate."""


@dataclass(kw_only=True)
class RankArgs(Setting):
    """Train every method once with each engine named, or alone, once for each order of the images in a batch."""

    engines: tuple[Literal["auto", "ddp", "zero0", "zero1", "zero2", "zero3"], ...] = ("auto",)
    """What shares out the steps, one after the other; zero0 to zero3 are DeepSpeed's stages."""
    orders: int = 1
    """Runs of each method: the first with the images of a batch as they come, the others with them permuted and torch's
    normalisation, which changes nothing but the order in which sums are made."""
    write: Path
    """File for the losses: by engine and method a list of runs, each a list of steps."""


def configure(args: RankArgs, engine: str, method: str) -> Config:
    """The run of `method`, in float32, over all processes where the method leaves a choice."""
    config = find(f"fundus-{method}")(args.data, Path())
    # A multiple of the batch: else an order would change which keys are overwritten first.
    loss = replace(config.loss, queue_size=16 * args.batch_size, temperature=0.2, ema=0.99)
    return replace(
        config,
        views=replace(config.views, size=args.size),
        model=replace(config.model, arch=args.arch, head="mlp", norm=args.norm),
        loss=replace(loss, barlow_correlation="global", projector_width=256),
        optim=replace(config.optim, batch_size=args.batch_size),
        run=replace(config.run, precision="fp32", log_every=args.steps, **ENGINES[engine]),
    )


def leave_norms_to_torch(module: nn.Module) -> None:
    """Normalise by torch's operations, whose sums are rounded more, as those of processes are that share statistics."""
    for part in module.modules():
        if isinstance(part, FusedBatchNorm2d):
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


def train(args: RankArgs, world: World, engine: str, method: str, order: int) -> list[float]:
    """The loss of each step."""
    config = configure(args, engine, method)
    trainer = Trainer(config, precision="fp32", world=world)
    if order:
        leave_norms_to_torch(trainer.module)
    manifest = load_manifest(args.data)
    images = Order(len(manifest), args.batch_size, config.run.seed, shard=world.rank, shards=world.size)
    rng = np.random.default_rng(order)
    loader = make_loader(
        "pillow", manifest, config.views, images, start=0, stop=args.steps, workers=1, device=world.device
    )
    with loader:
        for batch in loader:
            rows = torch.from_numpy(rng.permutation(len(batch.indices)) if order else np.arange(len(batch.indices)))
            trainer.step([Batch(batch.q[rows], batch.k[rows], batch.indices[rows.numpy()])], args.lr)
    return [row["loss"] for row in trainer.history.read()]


def main(args: RankArgs) -> int:
    """Run and write."""
    torch.set_num_threads(1)
    with joined("cpu") as world, freed_memory_kept("cpu"):
        found = {
            engine: {
                method: [train(args, world, engine, method, order) for order in range(args.orders)]
                for method in METHODS
            }
            for engine in args.engines
        }
        if world.first:
            args.write.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    start(main, RankArgs, "engines_rank")
