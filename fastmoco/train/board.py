"""A run's curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastmoco.train.metrics import Row


class Board:
    """The `tensorboard` folder of a run that begins after step `start`.

    A disk that is full costs its points, not the run: `warn` is told once, and metrics.jsonl goes on having them.
    """

    def __init__(self, folder: Path, start: int, *, warn: Callable[[str], None] = print) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.warn = warn
        # Points past the checkpoint, written by a run that was killed, are not shown.
        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, rows: Sequence[Row]) -> None:
        """Add every value of `rows` at its row's step."""
        if self._writer is None:
            return
        try:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(name, value, row["step"])
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is still to be written."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # Its thread has ended: the writer is of no further use.
        self._writer = None
        self.warn(f"warning: {self.folder} could not be written: {error}; it has no points from here on")
