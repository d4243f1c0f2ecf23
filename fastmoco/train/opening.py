"""How a run begins: what "auto" means here, what has to be there, and the lines that say what will be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.data.dali import dali_installed
from fastmoco.data.labelled import doubt_folders
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import find_pairs
from fastmoco.data.verify import describe_skipped
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.models.weights import initial_backbone
from fastmoco.precision import default_precision
from fastmoco.train.checkpoint import Checkpoint, Store, non_finite
from fastmoco.train.classes import describe_classes
from fastmoco.train.config import Config
from fastmoco.train.engines.make import engine_name
from fastmoco.train.folder import BAD_FILES, write_description, writing
from fastmoco.train.graph import check_capturable
from fastmoco.train.images import find_images, list_images, refuse_others, refuse_out_inside
from fastmoco.train.recipes import RECIPES
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


def listed_images(world: World, config: Config, store: Store, saved: Checkpoint | None) -> Manifest:
    """The run's images: what rank 0 finds and checks it lists in the run folder, where the others then read it.

    Raises UserError where they cannot be had, or are not those that the run of `saved` began with.
    """
    manifest = find_images(config, saved, listed=not world.first)
    refuse_out_inside(config, manifest)
    refuse_others(config, manifest, saved)
    # Before anything is written, or copied to a disk.
    find_pairs(config.data.pairs, manifest)
    if world.first:
        with writing(config, store):
            write_description(config=config, store=store, skipped=manifest.skipped)
            list_images(config, manifest, saved)
    return manifest


def initial_weights(world: World, config: Config, saved: Checkpoint | None) -> dict[str, Tensor] | None:
    """The backbone that training begins with, where --init names one and there is nothing to go on from; rank 0 says
    what was read.

    Raises UserError for weights that are not finite, and for whatever else a trainer may lack on this machine. A
    trainer's making is no place to find that: there the others wait for this process already.
    """
    check_capturable(config, world)
    engine_name(config, world)
    if saved is not None or config.model.init is None:
        return None
    tensors, said = initial_backbone(config.model.init, config.model.arch)
    broken = non_finite(tensors)
    if broken:
        more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise UserError(f"--init {config.model.init}: NaN or infinite values in {broken[0]}{more}; give other weights")
    if world.first:
        print(said, flush=True)
    return tensors


def refuse_single_images(world: World, config: Config, order: Order) -> None:
    """Raise UserError where BatchNorm has no variance: neither of one image's projection, nor of one 1 x 1 map."""
    needs_two = config.loss.method == "barlow" or config.loss.objective == "barlow-twins" or config.views.size <= 32
    if order.local_size == 1 and (needs_two or config.model.head == "projector"):
        of = "" if world.alone else f" for {world.size} processes"
        raise UserError(
            f"--batch-size {order.batch_size}{of}: BatchNorm cannot train on one image here; give a process at least 2"
        )


def describe(trainer: Trainer, manifest: Manifest, order: Order, plan: Plan, *, start: int, set_aside: int) -> None:
    """Print what `trainer` will do from step `start` on; `set_aside` of the images were bad before."""
    config, world = trainer.config, trainer.world
    skipped = manifest.skipped
    if skipped:
        print(f"{describe_skipped(skipped)}; see skipped.txt")
    where = world.device if world.alone else world.device.type
    shared = "" if world.alone else f" by {world.size} processes ({trainer.engine.name})"
    print(
        f"{config.recipe}: {config.model.arch} at {config.views.size} px on {len(manifest)} images, "
        f"{plan.total} steps of {config.optim.accumulate} x {config.optim.batch_size}{shared}, "
        f"{config.run.precision} on {where}, loading with {config.data.loader}; run folder {config.run.out}",
        flush=True,
    )
    left = order.left_out
    if left:
        print(
            f"{left} {'image fills' if left == 1 else 'images fill'} no batch and {'is' if left == 1 else 'are'} left "
            "out of an epoch, each time another draw; --no-drop-last takes every image"
        )
    if order.pairs is not None:
        print(f"pairs from two images of a patient: {order.pairs.paired} of the images have another to go with")
    for warning in barlow_warnings(config):
        print(f"warning: {warning}")
    if config.loss.objective == "barlow-twins" and config.model.head != "projector":
        print(f"warning: --head {config.model.head}: Barlow Twins wants --head projector, as wide as --dim")
    if trainer.targets is not None:
        print(describe_classes(manifest, trainer.targets))
    if config.run.knn_every and manifest.labels:
        print(describe_score(config, manifest))
    if config.model.norm == "frozen" and config.model.init is None:
        print("warning: --norm frozen without --init normalises nothing: its statistics are mean 0 and variance 1")
    if set_aside:
        print(f"{set_aside} of the images were set aside before, as {config.run.out / BAD_FILES} says")
    if start == plan.total:
        print(f"finished already at step {start}: nothing to train; --init {config.run.out} starts another run from it")
    elif start:
        print(f"going on from step {start}")
    elif config.run.resume:
        print(f"no checkpoint in {config.run.out}: begins at step 0")


def describe_score(config: Config, manifest: Manifest) -> str:
    """Which classes the kNN score while training tells apart."""
    name = next(iter(manifest.labels))
    classes = manifest.known_classes(name)
    shown = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
    every = "every epoch" if config.run.knn_every == 1 else f"every {config.run.knn_every} epochs"
    doubt = doubt_folders(name, classes)
    return f"kNN score {every}: by {name}, {len(classes)} classes ({shown})" + (f"; {doubt}" if doubt else "")


def barlow_warnings(config: Config) -> Iterator[str]:
    """What is likely a mistake in the settings of --method barlow."""
    loss = config.loss
    if loss.method != "barlow":
        return
    twins = loss.objective == "barlow-twins"
    if loss.stage_weight > (0.1 if twins else 0.01):
        fitting = "of barlow the paper has 5e-5, and 5e-4 goes with --barlow-scale 1 --barlow-off-diagonal 0.005"
        if twins:
            fitting = "of barlow, 0.02 goes with --objective barlow-twins and its recipes' other settings"
        yield f"--stage-weight {loss.stage_weight:g} is for --method mse; {fitting}"
    recipe = RECIPES.get(config.recipe)
    if not twins or recipe is None:
        return
    usual = recipe(Path(), Path()).loss
    for name in ("barlow_scale", "barlow_off_diagonal"):
        value, its = getattr(loss, name), getattr(usual, name)
        if value != its:
            option = f"--{name.replace('_', '-')}"
            yield (
                f"{option} {value:g} is of --objective barlow-twins too, not of the stages alone, and the recipe has "
                f"{its:g}: weigh the stages by --stage-weight"
            )
