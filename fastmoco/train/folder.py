"""The run folder: what it holds, and whether a run may begin in it or go on."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import fastmoco
from fastmoco.atomic import write_text
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint, Store
from fastmoco.train.config import Config, changed_fields, to_json

_PACKAGES = ("torch", "torchvision", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow")


def open_run(config: Config, store: Store) -> Checkpoint | None:
    """Make the run folder ready, write config.json and environment.json, and return what to go on from, if anything.

    Raises UserError where the folder holds a run and --resume was not given, where the configuration differs from
    that run's, where the newest checkpoint is damaged, or where the folder cannot be written.
    """
    run = config.run
    if store.paths() and not run.resume:
        raise UserError(f"--out {run.out} holds a run already: pass --resume to go on with it, or another folder")
    saved = store.latest() if run.resume else None
    now = to_json(config)
    if saved is not None:
        changes = changed_fields(saved.meta["config"], now)
        if changes:
            raise UserError(f"--resume: the run in {run.out} began with other settings: {'; '.join(changes)}")
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        store.remove_leftovers()
        write_text(run.out / "config.json", json.dumps(now, indent=2) + "\n")
        write_text(run.out / "environment.json", json.dumps(_environment(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {run.out}: cannot be written: {error}") from error
    return saved


def _environment() -> dict[str, str]:
    found = {"fastmoco": fastmoco.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
