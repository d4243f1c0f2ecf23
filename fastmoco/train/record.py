"""What a run writes and shows while it goes on: by rank 0 alone, the others keep silent."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Protocol

from fastmoco.atomic import write_text
from fastmoco.data.quarantine import Quarantine
from fastmoco.distributed.world import World
from fastmoco.train.board import Board
from fastmoco.train.config import Config
from fastmoco.train.curves import draw_curves
from fastmoco.train.folder import BAD_FILES
from fastmoco.train.metrics import MetricsFile, Row, read_rows
from fastmoco.train.progress import ProgressLine


class Record(Protocol):
    """Where a run's loop tells what happens; closed at the end of a `with` block, where the curves are drawn."""

    def __enter__(self) -> Record:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, on an exception as well."""

    def advance(self, step: int) -> None:
        """`step` steps are done."""

    def write(self, rows: list[Row]) -> None:
        """Keep the rows of metrics of the newest steps."""

    def bad_files(self, quarantine: Quarantine, new: int) -> None:
        """List the images that went bad, the last `new` of which nobody was told of."""

    def say(self, text: str) -> None:
        """Tell the person who watches."""

    def sync(self) -> None:
        """Bring what was written to the disk."""


class Files:
    """A Record in the run folder and on the terminal: metrics.jsonl, tensorboard/, curves.png, bad_files.txt."""

    def __init__(self, config: Config, parts: list[str], *, start: int, total: int) -> None:
        self.out = config.run.out
        self.metrics = MetricsFile(self.out / "metrics.jsonl", resume_at=start)
        self.board = Board(self.out / "tensorboard", start)
        self.progress = ProgressLine(done=start, total=total, parts=parts)

    def __enter__(self) -> Files:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        # On a disk that is full, what went wrong first is what is told.
        with contextlib.suppress(*([OSError] if error is not None else [])):
            self.metrics.close()
            self.board.close()
            draw_curves(read_rows(self.out / "metrics.jsonl"), self.out / "curves.png")

    def advance(self, step: int) -> None:
        self.progress.advance(step)

    def write(self, rows: list[Row]) -> None:
        self.metrics.write(rows)
        self.board.write(rows)
        if rows and "pairs_per_s" in rows[-1]:
            self.progress.show(rows[-1])

    def bad_files(self, quarantine: Quarantine, new: int) -> None:
        if new:
            for entry in quarantine.entries[-new:]:
                self.progress.say(f"set aside {entry}; another image takes its place")
            try:
                write_text(self.out / BAD_FILES, "".join(f"{entry}\n" for entry in quarantine.entries))
            except OSError as error:
                # Checkpoints hold the list too, and the next image that goes bad has it written again.
                self.progress.say(f"warning: {self.out / BAD_FILES} could not be written: {error}")

    def say(self, text: str) -> None:
        self.progress.say(text)

    def sync(self) -> None:
        self.metrics.sync()


class Silence:
    """A Record of nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def write(self, rows: list[Row]) -> None:
        pass

    def bad_files(self, quarantine: Quarantine, new: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass


def make_record(config: Config, world: World, parts: list[str], *, start: int, total: int) -> Record:
    """The one that this process keeps. `parts` are the names of the losses; `start` of `total` steps are done."""
    return Files(config, parts, start=start, total=total) if world.first else Silence()
