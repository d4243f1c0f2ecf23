"""The line a person watches while a run goes on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastmoco.tracking import Lines
from fastmoco.train.metrics import Row


class ProgressLine:
    """A live bar with the newest metrics on a terminal; elsewhere, one plain line at each logging step."""

    def __init__(self, *, done: int, total: int, parts: list[str]) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total = total
        self.parts = parts
        self._first = done
        self._lines = Lines(self.console, total - done)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task: TaskID = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        self._bar.update(self._task, completed=step)

    def show(self, row: Row) -> None:
        """Show the newest row of metrics."""
        losses = "  ".join(f"{name} {row[name]:.4g}" for name in ("loss", *self.parts))
        queue = f"queue {row['queue_fill']:.0%}  " if "queue_fill" in row else ""
        text = (
            f"{losses}  spread {row['embedding_std']:.2f}  {queue}lr {row['lr']:.2g}  "
            f"{row['pairs_per_s']:.1f} pairs/s (loading {row['data_wait']:.0%})  "
            f"ETA {self._lines.left(row['step'] - self._first)}"
        )
        if "knn_accuracy" in row:
            text += f"  kNN accuracy {row['knn_accuracy']:.3f}"
        self._bar.update(self._task, completed=row["step"], description=text)
        if not self.console.is_terminal:
            self.say(f"step {row['step']}/{self.total}  epoch {row['epoch']:.2f}  {text}")
