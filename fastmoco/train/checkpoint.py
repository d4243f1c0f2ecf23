"""Checkpoints: safetensors files, one a save, each complete or absent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.models.weights import CHECKPOINTS, read_weights, write_weights

# Seconds before a save that has to succeed is tried again; twice as many before each further try, up to the longest.
RETRY_AFTER, LONGEST_PAUSE = 1.0, 30.0


@dataclass
class Checkpoint:
    """What a run is at the end of a step: `tensors` by name, and `meta`, plain JSON values ("step" among them)."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.meta["step"])

    def copy(self) -> Checkpoint:
        """The same in memory of its own, on the host."""
        tensors = {name: value.detach().to("cpu", copy=True) for name, value in self.tensors.items()}
        return Checkpoint(tensors, self.meta)


def _nothing() -> None:
    pass


class Store:
    """The checkpoints of the run folder `run`, of which the newest `keep` stay.

    A save may fail, or be left out because the one before is still being written: it is then missed, which `warn` is
    told, from any thread. `max_failed` missed in a row are an error. `alive` is called between two tries of a save that
    has to succeed.
    """

    def __init__(
        self,
        run: Path,
        keep: int = 2,
        *,
        max_failed: int = 3,
        warn: Callable[[str], None] = print,
        alive: Callable[[], None] = _nothing,
    ) -> None:
        self.folder = run / CHECKPOINTS
        self.keep = keep
        self.max_failed = max_failed
        self.warn = warn
        self.alive = alive
        self._writing: _Writing | None = None
        self._missed = 0

    def paths(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, checkpoint: Checkpoint, *, before: Callable[[], None] = _nothing) -> None:
        """Have `checkpoint` written by a thread, from a copy: its tensors may change as soon as this returns.

        before: what has to be on disk before the checkpoint is; called by that thread, may raise OSError.

        Returns at once, but for the last save before `max_failed` are missed in a row: that one waits. Raises
        UserError, naming the file and the last good checkpoint, where that fails too.
        """
        if self._writing is not None and self._writing.is_alive() and self._missed + 1 < self.max_failed:
            self._missed += 1
            self.warn(
                f"warning: no checkpoint of step {checkpoint.step}, since {self._writing.path.name} is still being "
                f"written after {self._writing.seconds:.1f} s: the folder is slow; save less often "
                "(--checkpoint-every, --checkpoint-minutes)"
            )
            return
        self._collect()
        last = self._missed + 1 >= self.max_failed
        self._writing = _Writing(self, checkpoint.copy(), before, warn=not last)
        self._writing.start()
        if last:
            self._collect()

    def save_now(self, checkpoint: Checkpoint, *, before: Callable[[], None] = _nothing) -> Path:
        """Write `checkpoint`, trying up to `max_failed` times; return its file.

        Raises UserError, naming the file and the last good checkpoint, where it cannot be written.
        """
        self.finish()
        for attempt in range(1, self.max_failed + 1):
            try:
                path = self.write(checkpoint, before)
                break
            except UserError as error:
                if attempt == self.max_failed:
                    raise UserError(f"{error}; {self.last_good()}") from error
                pause = min(RETRY_AFTER * 2 ** (attempt - 1), LONGEST_PAUSE)
                self.warn(f"warning: {error}; trying again in {pause:g} s ({attempt} of {self.max_failed} failed)")
                time.sleep(pause)
                self.alive()
        self._missed = 0
        return path

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._writing is not None:
            self._writing.join()

    def _collect(self) -> None:
        """Wait for the checkpoint that is being written; count it as missed where it could not be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        if writing.error is None:
            self._missed = 0
            return
        self._missed += 1
        if self._missed >= self.max_failed:
            missed = f"{self._missed} in a row were missed (--max-failed-saves); " if self._missed > 1 else ""
            raise UserError(f"{writing.error}; {missed}{self.last_good()}") from writing.error

    def write(self, checkpoint: Checkpoint, before: Callable[[], None]) -> Path:
        """Write `checkpoint`, once; only when it is safely on disk are older ones removed.

        Raises UserError, naming the file, where it cannot be written.
        """
        path = self.path(checkpoint.step)
        try:
            before()
            write_weights(path, checkpoint.tensors, checkpoint.meta)
            for old in self.paths()[: -self.keep]:
                old.unlink()
        except OSError as error:
            raise UserError(f"{path} could not be written: {error}") from error
        return path

    def path(self, step: int) -> Path:
        """The file of the checkpoint of `step`."""
        return self.folder / f"step-{step:09d}.safetensors"

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
        """A sentence naming the newest complete checkpoint, once none is being written."""
        self.finish()
        paths = self.paths()
        return f"the last good checkpoint is {paths[-1]}" if paths else "there is no earlier checkpoint"

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for path in self.folder.glob(".step-*.tmp-*"):
            path.unlink()


class _Writing(threading.Thread):
    """One checkpoint being written; `error` is why it could not be, once it has ended."""

    def __init__(self, store: Store, checkpoint: Checkpoint, before: Callable[[], None], *, warn: bool) -> None:
        # Where the folder hangs, the process must still be able to end.
        super().__init__(name="checkpoint", daemon=True)
        self.path = store.path(checkpoint.step)
        self.error: UserError | None = None
        self._work = (store, checkpoint, before, warn)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long ago it began."""
        return time.monotonic() - self._began

    def run(self) -> None:
        store, checkpoint, before, warn = self._work
        try:
            store.write(checkpoint, before)
        except UserError as error:
            self.error = error
            if warn:
                store.warn(
                    f"warning: {error}; training goes on to the next checkpoint, and stops where {store.max_failed} in "
                    "a row are missed"
                )


def non_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a value that is not finite."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _finite(tensor)]


def _finite(tensor: Tensor) -> bool:
    # A NaN is both the least and the greatest. One pass, a ninth of the time of isfinite, which writes one more tensor.
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
