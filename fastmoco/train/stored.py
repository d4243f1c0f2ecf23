"""A configuration as it is stored with a run, and whether a run may go on with another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastmoco.train.config import Config


def to_json(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# A resumed run may differ in these: they do not change what is computed, `update` to rounding.
FREE_ON_RESUME = {
    "data": {"data", "labels", "workers", "stage", "max_bad"},
    "optim": {"update"},
    "run": {
        "out", "resume", "device", "engine", "zero", "cuda_graph", "log_every", "checkpoint_every",
        "checkpoint_minutes", "keep_checkpoints", "max_failed_saves", "watchdog", "knn_every",
    },
}


def changed_fields(stored: dict[str, Any], config: Config) -> list[str]:
    """What a resumed run was given that differs from the stored configuration, as "--field was A, is B".

    A field that the stored one lacks came after the version that wrote it, and counts as its default: a new field's
    default has to be what was done before there was the field, or the field be free on resume. Of the loss only what
    it uses counts.
    """
    changes = []
    for group, values in to_json(config).items():
        if not isinstance(values, dict):
            if stored.get(group) != values:
                changes.append(f"{group} was {stored.get(group)}, is {values}")
            continue
        known = dataclasses.fields(getattr(config, group))
        defaults = {f.name: _plain(f.default) for f in known if f.default is not dataclasses.MISSING}
        before = defaults | stored.get(group, {})
        free = FREE_ON_RESUME.get(group, set()) | ({*config.loss.unused} if group == "loss" else set())
        for name, value in values.items():
            if before.get(name) != value and name not in free:
                changes.append(f"--{name.replace('_', '-')} was {before.get(name)}, is {value}")
    return changes
