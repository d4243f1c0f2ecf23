"""The run folder: what it holds, and whether a run may begin in it or go on."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import fastmoco
from fastmoco.atomic import write_text
from fastmoco.data.verify import Skipped
from fastmoco.errors import UserError
from fastmoco.models.weights import CONFIG
from fastmoco.train.checkpoint import Checkpoint, Store
from fastmoco.train.config import Config
from fastmoco.train.stored import changed_fields, to_json

# Where the images stand that went bad during the run.
BAD_FILES = "bad_files.txt"
_PACKAGES = ("torch", "torchvision", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow")


def find_checkpoint(config: Config, store: Store) -> Checkpoint | None:
    """What the run goes on from, if anything.

    Raises UserError where the folder holds a run and --resume was not given, where the configuration differs from
    that run's, or where the newest checkpoint is damaged.
    """
    run = config.run
    if run.out.exists() and not run.out.is_dir():
        raise UserError(f"--out {run.out} is a file: name a folder")
    if store.paths() and not run.resume:
        raise UserError(f"--out {run.out} holds a run already: pass --resume to go on with it, or another folder")
    saved = store.latest() if run.resume else None
    if saved is not None:
        changes = changed_fields(saved.meta["config"], config)
        if changes:
            raise UserError(f"--resume: the run in {run.out} began with other settings: {'; '.join(changes)}")
    return saved


def write_description(config: Config, store: Store, skipped: list[Skipped]) -> None:
    """Make the run folder ready and write config.json, environment.json and, if any files were, skipped.txt."""
    out = config.run.out
    store.folder.mkdir(parents=True, exist_ok=True)
    store.remove_leftovers()
    write_text(out / CONFIG, json.dumps(to_json(config), indent=2) + "\n")
    write_text(out / "environment.json", json.dumps(_environment(), indent=2) + "\n")
    if skipped:
        write_text(out / "skipped.txt", "".join(f"{item}\n" for item in skipped))


@contextlib.contextmanager
def writing(config: Config, store: Store) -> Iterator[None]:
    """Where the run folder cannot be written, raise UserError for the OSError, naming the last good checkpoint."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror} ({error.filename})" if error.strerror and error.filename else str(error)
        kept = f"; {store.last_good()}" if store.paths() else ""
        raise UserError(f"--out {config.run.out} could not be written: {why}{kept}") from error


def _environment() -> dict[str, str]:
    found = {"fastmoco": fastmoco.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
