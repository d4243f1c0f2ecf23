"""Recipes: functions that return a complete configuration.

The paper's three domains and three methods with its constants, MoCo v2, and a small-data variant of each for sets of
some thousands of images, where a queue of 65,536 would take dozens of epochs to fill.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.train.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig

Method = Literal["moco", "mse", "barlow"]
METHODS: tuple[Method, ...] = ("moco", "mse", "barlow")


@dataclass(frozen=True)
class Domain:
    """What the paper sets for a kind of image."""

    views: ViewConfig
    batch_size: int
    grids: tuple[int, int, int, int]


DOMAINS = {
    "histology": Domain(
        ViewConfig(size=255, resize=256 / 255, crop_scale=(0.4, 1.0), flip_p=0.5), batch_size=32, grids=(1, 1, 1, 1)
    ),
    "chest-xray": Domain(ViewConfig(size=512, resize=1.0, rotation=30.0), batch_size=16, grids=(16, 16, 4, 4)),
    "fundus": Domain(ViewConfig(size=299, resize=1.0, rotation=30.0, flip_p=0.5), batch_size=8, grids=(16, 16, 4, 4)),
}


def paper(data: Path, out: Path, *, domain: str, method: Method) -> Config:
    """The intermediate-layer paper's constants for `domain` and `method` (Kaku et al. 2021)."""
    kind = DOMAINS[domain]
    return Config(
        recipe=f"{domain}-{method}",
        data=DataConfig(data=data),
        run=RunConfig(out=out),
        views=kind.views,
        model=ModelConfig(head="linear"),
        loss=LossConfig(method=method, stage_weight=5e-5 if method == "barlow" else 0.25, grids=kind.grids),
        optim=OptimConfig(batch_size=kind.batch_size, schedule="constant"),
    )


def mocov2(data: Path, out: Path) -> Config:
    """MoCo v2 as published for ImageNet (Chen et al. 2020)."""
    return Config(
        recipe="mocov2",
        data=DataConfig(data=data),
        run=RunConfig(out=out),
        views=ViewConfig(size=224, crop_scale=(0.2, 1.0), flip_p=0.5),
        model=ModelConfig(head="mlp"),
        loss=LossConfig(method="moco", temperature=0.2),
        optim=OptimConfig(batch_size=256, schedule="cosine"),
    )


def small(full: Callable[[Path, Path], Config], data: Path, out: Path) -> Config:
    """The recipe `full` for thousands of images: a queue and a momentum that turn over within a few epochs.

    Without the warm-up, such a queue can be told from its positives by its age alone: all embeddings drift together,
    the loss falls, and the images are not told apart.
    """
    config = full(data, out)
    return replace(
        config,
        recipe=config.recipe + "-small",
        model=replace(config.model, head="mlp"),
        loss=replace(config.loss, queue_size=1024, temperature=0.2, ema=0.99),
        optim=replace(config.optim, batch_size=64, lr=0.06, schedule="cosine", warmup_epochs=5.0, epochs=60),
    )


Recipe = Callable[[Path, Path], Config]
RECIPES: dict[str, Recipe] = {
    f"{domain}-{method}": partial(paper, domain=domain, method=method) for domain in DOMAINS for method in METHODS
}
RECIPES["mocov2"] = mocov2
RECIPES |= {f"{name}-small": partial(small, full) for name, full in list(RECIPES.items())}


def find(name: str) -> Recipe:
    """The recipe called `name`. Raises UserError, with the nearest names, where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"no recipe {name!r}: {hint}`fastmoco recipes` lists them all")
    return RECIPES[name]
