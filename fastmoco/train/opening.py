"""How a run begins: what "auto" means here, and the lines that say what will be trained."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmoco.data.dali import dali_installed
from fastmoco.data.manifest import Manifest
from fastmoco.precision import default_precision
from fastmoco.train.config import Config
from fastmoco.train.folder import BAD_FILES
from fastmoco.train.schedules import Plan
from fastmoco.train.trainer import Trainer


def resolve(config: Config, device: torch.device) -> Config:
    """`config` with every "auto" replaced by what it means here: it is stored with the run and held to on resume."""
    loader, precision = config.data.loader, config.run.precision
    if loader == "auto":
        loader = "dali" if dali_installed() else "pillow"
    if precision == "auto":
        precision = default_precision(device.type)
    return replace(
        config,
        data=replace(config.data, loader=loader),
        run=replace(config.run, precision=precision, device=str(device)),
    )


def describe(trainer: Trainer, manifest: Manifest, plan: Plan, *, start: int, set_aside: int) -> None:
    """Print what `trainer` will do from step `start` on; `set_aside` of the images were bad before."""
    config, world = trainer.config, trainer.world
    skipped = manifest.skipped
    if skipped:
        first = str(skipped[0]).encode(errors="backslashreplace").decode()
        print(f"left out {len(skipped)} files, the first {first}; see skipped.txt")
    where = world.device if world.alone else world.device.type
    shared = "" if world.alone else f" by {world.size} processes ({trainer.engine.name})"
    print(
        f"{config.recipe}: {config.model.arch} at {config.views.size} px on {len(manifest)} images, "
        f"{plan.total} steps of {config.optim.accumulate} x {config.optim.batch_size}{shared}, "
        f"{config.run.precision} on {where}, loading with {config.data.loader}; run folder {config.run.out}",
        flush=True,
    )
    if config.model.norm == "frozen" and config.model.init is None:
        print("warning: --norm frozen without --init normalises nothing: its statistics are mean 0 and variance 1")
    if set_aside:
        print(f"{set_aside} of the images were set aside before, as {config.run.out / BAD_FILES} says")
    if start == plan.total:
        print(f"finished already at step {start}: nothing to train; --init {config.run.out} starts another run from it")
    elif start:
        print(f"going on from step {start}")
