"""Checkpoints: safetensors files, one a save, each complete or absent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.models.weights import CHECKPOINTS, read_weights, write_weights


@dataclass
class Checkpoint:
    """What a run is at the end of a step: `tensors` by name, and `meta`, plain JSON values ("step" among them)."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.meta["step"])


class Store:
    """The checkpoints of the run folder `run`, of which the newest `keep` stay."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder = run / CHECKPOINTS
        self.keep = keep

    def paths(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write `checkpoint`; only once it is safely on disk are older ones removed.

        Raises UserError, naming the file and the last good checkpoint, where it cannot be written.
        """
        path = self.folder / f"step-{checkpoint.step:09d}.safetensors"
        try:
            write_weights(path, checkpoint.tensors, checkpoint.meta)
        except UserError as error:
            raise UserError(f"{error}; {self.last_good()}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none. Raises UserError where it is damaged."""
        paths = self.paths()
        if not paths:
            return None
        tensors, meta = read_weights(paths[-1])
        if "step" not in meta:
            raise UserError(f"{paths[-1]}: not a checkpoint of fastmoco; remove it or choose another --out")
        return Checkpoint(tensors, meta)

    def last_good(self) -> str:
        """A sentence naming the newest complete checkpoint."""
        paths = self.paths()
        return f"the last good checkpoint is {paths[-1]}" if paths else "there is no earlier checkpoint"

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for path in self.folder.glob(".step-*.tmp-*"):
            path.unlink()


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a value that is not finite."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
