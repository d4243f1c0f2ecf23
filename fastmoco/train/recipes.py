"""Recipes: functions that return a complete configuration.

The paper's three domains and three methods with its constants, MoCo v2, the objectives of one encoder, and a small-data
variant of each for sets of hundreds to thousands of images, where a queue of 65,536 would take dozens of epochs to
fill: with other epochs, other weights and another form of the stage losses, and of tissue and fundus photographs weaker
colour jitter, all of which docs/results/search.md compares.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
    small_epochs: int
    """Passes over a small set: of tissue by the search, on 2,054 images; for fundus photographs and X-rays those of the
    study, on 306 and 507. More images need fewer."""
    small_views: dict[str, Any] = field(default_factory=dict)
    """What such a set's views have instead."""


# By docs/results/search.md: on small sets of tissue, encoders trained to be blind to colour score below random weights,
# and on fundus photographs a point below those with this jitter. On gray X-rays it makes no difference.
_WEAK_JITTER = {"jitter": (0.2, 0.2, 0.1, 0.02), "gray_p": 0.0}

DOMAINS = {
    "histology": Domain(
        ViewConfig(size=255, resize=256 / 255, crop_scale=(0.4, 1.0), flip_p=0.5),
        batch_size=32,
        grids=(1, 1, 1, 1),
        small_epochs=40,
        small_views=_WEAK_JITTER,
    ),
    "chest-xray": Domain(
        ViewConfig(size=512, resize=1.0, rotation=30.0), batch_size=16, grids=(16, 16, 4, 4), small_epochs=100
    ),
    "fundus": Domain(
        ViewConfig(size=299, resize=1.0, rotation=30.0, flip_p=0.5),
        batch_size=8,
        grids=(16, 16, 4, 4),
        small_epochs=150,
        small_views=_WEAK_JITTER,
    ),
}
# By the same search. With 1 the squared error is half a point above the paper's 0.25 on fundus photographs, level on
# tissue, and on X-rays level at stage 4 and lower below it. Barlow Twins' form is a point above the paper's on tissue.
_SMALL_LOSSES: dict[str, dict[str, Any]] = {
    "moco": {},
    "none": {},
    "mse": {"stage_weight": 1.0},
    "barlow": {"stage_weight": 5e-4, "barlow_scale": 1.0, "barlow_off_diagonal": 0.005},
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


def mocov2_symmetric(data: Path, out: Path) -> Config:
    """MoCo v2 with each view as query and key once (of Chen, Xie and He 2021, the loss)."""
    config = mocov2(data, out)
    return replace(config, recipe="mocov2-symmetric", loss=replace(config.loss, symmetric=True))


def simclr(data: Path, out: Path) -> Config:
    """SimCLR as published for ImageNet (Chen et al. 2020)."""
    return _joint(
        "simclr",
        data,
        out,
        ViewConfig(size=224, crop_scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), flip_p=0.5),
        LossConfig(objective="simclr", method="none", temperature=0.1),
        OptimConfig(batch_size=4096, lr=4.8, weight_decay=1e-6, epochs=100),
    )


def simclr_margin(data: Path, out: Path) -> Config:
    """SimCLR with the additive margin of Lepage and Dehak (2023)."""
    config = simclr(data, out)
    return replace(config, recipe="simclr-margin", loss=replace(config.loss, margin=0.1))


def supcon(data: Path, out: Path) -> Config:
    """Supervised contrastive learning (Khosla et al. 2020), which takes labels, with SimCLR's views and optimiser."""
    config = simclr(data, out)
    return replace(config, recipe="supcon", loss=replace(config.loss, objective="supcon"))


def barlow_twins(data: Path, out: Path) -> Config:
    """Barlow Twins as published for ImageNet (Zbontar et al. 2021), both views drawn alike, without solarisation."""
    return _joint(
        "barlow-twins",
        data,
        out,
        ViewConfig(size=224, crop_scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), flip_p=0.5),
        LossConfig(
            objective="barlow-twins", method="none", barlow_scale=0.024, barlow_off_diagonal=0.0051,
            barlow_correlation="global",
        ),
        OptimConfig(batch_size=2048, lr=1.6, weight_decay=1.5e-6, epochs=1000),
        ModelConfig(head="projector", dim=8192),
    )  # fmt: skip


def barlow_twins_mixed(data: Path, out: Path) -> Config:
    """Barlow Twins with mixed samples (Bandara et al. 2023)."""
    config = barlow_twins(data, out)
    return replace(config, recipe="barlow-twins-mixed", loss=replace(config.loss, mix_weight=5.0))


def _joint(
    name: str,
    data: Path,
    out: Path,
    views: ViewConfig,
    loss: LossConfig,
    optim: OptimConfig,
    model: ModelConfig | None = None,
) -> Config:
    """What the objectives of one encoder have in common: LARS, ten epochs of warm-up and half a cosine."""
    return Config(
        recipe=name,
        data=DataConfig(data=data),
        run=RunConfig(out=out),
        views=views,
        model=model or ModelConfig(head="mlp"),
        loss=loss,
        optim=replace(optim, optimizer="lars", schedule="cosine", warmup_epochs=10.0),
    )


def small(full: Callable[[Path, Path], Config], data: Path, out: Path) -> Config:
    """The recipe `full` for thousands of images: a queue and a momentum that turn over within a few epochs, and what
    docs/results/search.md found for the method and the kind of image.

    Without the warm-up, such a queue can be told from its positives by its age alone: all embeddings drift together,
    the loss falls, and the images are not told apart.
    """
    config = full(data, out)
    kind = DOMAINS.get(config.recipe.removesuffix(f"-{config.loss.method}"))
    epochs, views = (60, {}) if kind is None else (kind.small_epochs, kind.small_views)
    # Queue and momentum also where the recipe's own objective has none: for `--objective moco`.
    own = _SMALL_LOSSES[config.loss.method] | {"temperature": 0.2, "queue_size": 1024, "ema": 0.99}
    twins = config.loss.objective == "barlow-twins"
    if config.loss.mix_weight:
        # With 5, 20 epochs on 2,054 patches of tissue learned less than random weights have
        # (docs/results/objectives.md).
        own |= {"mix_weight": 1.0}
    return replace(
        config,
        recipe=config.recipe + "-small",
        views=replace(config.views, **views),
        model=replace(config.model, dim=1024) if twins else replace(config.model, head="mlp"),
        loss=replace(config.loss, **own),
        optim=OptimConfig(batch_size=64, lr=0.06, schedule="cosine", warmup_epochs=5.0, epochs=epochs),
    )


Recipe = Callable[[Path, Path], Config]
_FULL: dict[str, Recipe] = {
    f"{domain}-{method}": partial(paper, domain=domain, method=method) for domain in DOMAINS for method in METHODS
} | {
    "mocov2": mocov2,
    "mocov2-symmetric": mocov2_symmetric,
    "simclr": simclr,
    "simclr-margin": simclr_margin,
    "supcon": supcon,
    "barlow-twins": barlow_twins,
    "barlow-twins-mixed": barlow_twins_mixed,
}
RECIPES = _FULL | {f"{name}-small": partial(small, full) for name, full in _FULL.items()}


def find(name: str) -> Recipe:
    """The recipe called `name`. Raises UserError, with the nearest names, where there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"no recipe {name!r}: {hint}`fastmoco recipes` lists them all")
    return RECIPES[name]
