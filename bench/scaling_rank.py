"""One process of bench.scaling: steps that are shared with the others, and in turn the same steps alone beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastmoco.data.loader import Batch
from fastmoco.distributed.collectives import gather, start_sum
from fastmoco.distributed.launch import Launch, joined
from fastmoco.distributed.world import World
from fastmoco.train.config import Config
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer


@dataclass(kw_only=True)
class Setting:
    """What is trained, and for how many steps; the batch is that of all processes together."""

    recipe: str = "histology-barlow"
    """Recipe whose method, head and constants are used."""
    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """Encoder."""
    size: int = 64
    """Side of the images, pixels."""
    batch_size: int = 32
    """Images a step, of all processes together."""
    key_shuffle: Literal["none", "global"] = "global"
    """Whether keys' images are exchanged."""
    correlation: Literal["per_rank", "global"] = "global"
    """Whether projections are gathered."""
    norm: Literal["batch", "sync"] = "batch"
    """Whether BatchNorm's statistics are shared."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the encoders."""
    rounds: int = 12
    """Timed steps of each kind."""


def configure(setting: Setting, *, batch_size: int) -> Config:
    """The configuration of `setting` for a world that shares out `batch_size` images."""
    config = find(setting.recipe)(Path(), Path())
    return replace(
        config,
        views=replace(config.views, size=setting.size),
        model=replace(config.model, arch=setting.arch, norm=setting.norm),
        loss=replace(config.loss, key_shuffle=setting.key_shuffle, barlow_correlation=setting.correlation),
        optim=replace(config.optim, batch_size=batch_size),
        run=replace(config.run, precision=setting.precision, log_every=10**4),
    )


def measure(world: World, setting: Setting) -> dict[str, Any]:
    """Seconds and processor seconds of both kinds of step, in every process; bytes a shared one sends, by kind.

    Alone means with this process's images and nothing to send: all do that at the same time too, so that the machine
    is as busy, and the difference of both is what sharing costs.
    """
    rows = setting.batch_size // world.size
    generator = torch.Generator().manual_seed(world.rank)
    views = [torch.rand(rows, 3, setting.size, setting.size, generator=generator) for _ in range(2)]
    q, k = (view.half().contiguous(memory_format=torch.channels_last) for view in views)
    batch = Batch(q, k, np.arange(rows))
    shared = Trainer(configure(setting, batch_size=setting.batch_size), precision=setting.precision, world=world)
    alone = Trainer(configure(setting, batch_size=rows), precision=setting.precision, world=World(device=world.device))
    steps: list[Callable[[], None]] = [lambda: shared.step([batch], lr=1e-4), lambda: alone.step([batch], lr=1e-4)]
    for step in steps:
        step()
    sent = dict(world.sent)
    taken = torch.zeros(setting.rounds, len(steps), 2, dtype=torch.float64)
    for turn in range(setting.rounds):
        for kind, step in enumerate(steps):
            # All begin together; its bytes are not the step's.
            meeting = start_sum(world, torch.zeros(1), kind="meeting")
            if meeting is not None:
                meeting.wait()
            began, used = time.perf_counter(), time.process_time()
            step()
            taken[turn, kind, 0] = time.perf_counter() - began
            taken[turn, kind, 1] = time.process_time() - used
    counted = {name: (total - sent.get(name, 0)) / setting.rounds for name, total in world.sent.items()}
    counted.pop("meeting", None)
    everyone = gather(world, taken[None], kind="meeting")
    return {"seconds": everyone[..., 0].tolist(), "cpu_seconds": everyone[..., 1].tolist(), "sent": counted}


def main(rank: int, size: int, port: int, setting: Setting, path: Path) -> None:
    """Measure, as process `rank` of `size`; the first writes what all measured to `path`."""
    torch.set_num_threads(1)
    with joined("cpu", launch=Launch("bench.scaling", rank, size, rank, size, port=port)) as world:
        found = measure(world, setting)
        if world.first:
            path.write_text(json.dumps(found))
