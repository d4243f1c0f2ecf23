"""What trained the encoders and the classifiers, as the finished cells say, and where it is not what the recipe has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmoco.evaluate.probe import C_GRID
from fastmoco.study.config import SCRATCH
from fastmoco.study.overrides import recipe_name
from fastmoco.study.plots import label_of
from fastmoco.study.report.blocks import Block, Heading, Listing, Table, Text
from fastmoco.study.report.gather import Findings
from fastmoco.study.report.words import NOT_KNOWN
from fastmoco.train.recipes import find
from fastmoco.train.stored import to_json

# Group, field and heading of what is shown of a pretraining; the rest only where it is not the recipe's.
_PRETRAINING = (
    ("optim", "epochs", "epochs"),
    ("optim", "steps", "or steps"),
    ("optim", "batch_size", "batch"),
    ("optim", "lr", "learning rate"),
    ("optim", "schedule", "schedule"),
    ("loss", "temperature", "temperature"),
    ("loss", "queue_size", "queue"),
    ("loss", "ema", "momentum of the key encoder"),
    ("loss", "stage_weight", "weight of a stage's loss"),
    ("run", "precision", "precision"),
)
_TRAINED = {"full": "all weights", "linear": "a linear layer", SCRATCH: "from scratch"}
_FINETUNING = (
    ("lr", "learning rate"),
    ("encoder_lr", "of the encoder"),
    ("weight_decay", "weight decay"),
    ("batch_size", "batch"),
    ("epochs", "epochs"),
    ("least_steps", "least steps"),
    ("most_steps", "most steps"),
    ("validate_every", "steps between looks"),
    ("patience", "patience"),
    ("precision", "precision"),
)


def settings(every: Sequence[Findings]) -> list[Block]:
    """The settings of pretraining, fine-tuning and probes."""
    blocks: list[Block] = [Heading(level=2, text="Settings")]
    rows, changes = _pretraining(every)
    if rows:
        header = ("data and method", *(heading for _, _, heading in _PRETRAINING))
        blocks.append(Table(caption="Pretraining", header=header, rows=tuple(rows)))
        summary = "Where pretraining is not as its recipe says"
        blocks.append(Listing(items=tuple(changes), summary=summary, folded=len(changes) > 10))
    rows, views = _finetuning(every)
    if rows:
        header = ("data and what is trained", *(heading for _, heading in _FINETUNING))
        blocks.append(Table(caption="Fine-tuning (Adam)", header=header, rows=tuple(rows)))
        blocks.append(Listing(items=tuple(views), summary="Training images are augmented by"))
    constants = ", ".join(f"{c:g}" for c in C_GRID)
    said = f"Probes: logistic regression on features of mean 0 and variance 1, its constant C one of {constants}."
    return [*blocks, Text(text=said)]


def _pretraining(every: Sequence[Findings]) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row for each set and method, and what differs from the recipes."""
    rows, changes = [], []
    for found in every:
        seen: dict[str, Mapping[str, Any]] = {}
        for record in found.of_kind("pretrain"):
            seen.setdefault(record["settings"]["method"], record["settings"]["config"])
        for method, config in seen.items():
            shown = (_shown(config[group].get(name)) for group, name, _ in _PRETRAINING)
            rows.append((f"{found.data.name}, {label_of(method)}", *shown))
            recipe = recipe_name(found.data.recipe, method, small=found.data.small)
            other = [f"{name} {_shown(a)} (recipe: {_shown(b)})" for name, a, b in _differences(recipe, config)]
            if other:
                changes.append(f"{found.data.name}, {recipe}: {', '.join(other)}")
    return rows, changes


def _differences(recipe: str, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, value and the recipe's value of each field of a pretraining that is not the recipe's."""
    plain = json.loads(json.dumps(to_json(find(recipe)(Path(), Path()))))
    return [
        (name, value, plain[group][name])
        for group, fields in config.items()
        for name, value in fields.items()
        if value != plain.get(group, {}).get(name, value)
    ]


def _finetuning(every: Sequence[Findings]) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row for each set and for what is trained, and how its training images are augmented: a line for each set, or
    where they differ for what is trained."""
    rows, views = [], []
    for found in every:
        seen: dict[str, Mapping[str, Any]] = {}
        for record in found.of_kind("finetune"):
            own = record["settings"]
            seen.setdefault(SCRATCH if own["init"] == SCRATCH else own["mode"], own["config"])
        for trained, config in seen.items():
            shown = (_shown(config.get(name)) for name, _ in _FINETUNING)
            rows.append((f"{found.data.name}, {_TRAINED[trained]}", *shown))
        alike: dict[str, list[str]] = {}
        for trained, config in seen.items():
            alike.setdefault(_augmentation(config.get("views") or {}), []).append(_TRAINED[trained])
        for said, names in alike.items():
            views.append(f"{', '.join([found.data.name, *(names if len(alike) > 1 else [])])}: {said}")
    return rows, views


def _augmentation(views: Mapping[str, Any]) -> str:
    """What fine-tuning takes of `views`: where things lie and how large they are."""
    geometry = {name: views.get(name) for name in ("crop_scale", "rotation", "flip_p")}
    return ", ".join(f"{name} {_shown(value)}" for name, value in geometry.items() if value) or "nothing"


def _shown(value: Any) -> str:
    if value is None:
        return NOT_KNOWN
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
