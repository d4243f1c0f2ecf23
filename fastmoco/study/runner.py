"""Going through the grid: what is to be computed, in which order, by how many processes at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastmoco.study.cell import Cell
from fastmoco.study.config import Study
from fastmoco.study.estimate import Estimate, in_words
from fastmoco.study.pool import Pool
from fastmoco.study.store import Store
from fastmoco.study.worker import Job, Outcome

# Seconds between looks at what other runners do.
_LOOK = 2.0


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the cells of a run, by id. `failed` and `left` have reasons."""

    done: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class Runner:
    """Computes `todo`, cells by id, each after those that it needs; what others have finished meanwhile is taken.

    `cells` are all of the grid. With `again`, the ids in it are computed also where they are finished. No cell is begun
    after `most_seconds`, nor one that by the estimate would be under way then, unless it pretrains: that goes on later.
    """

    def __init__(
        self,
        study: Study,
        store: Store,
        cells: Mapping[str, Cell],
        todo: Mapping[str, Cell],
        *,
        estimate: Estimate,
        command: str,
        jobs: int,
        again: frozenset[str] = frozenset(),
        most_seconds: float | None = None,
        console: Console | None = None,
    ) -> None:
        self.study, self.store, self.cells = study, store, cells
        self.todo = dict(todo)
        self.estimate, self.command, self.jobs, self.again = estimate, command, jobs, again
        self.console = console or Console()
        self.tally = Tally()
        self._start, self._began = time.monotonic(), time.time()
        self._deadline = None if most_seconds is None else self._start + most_seconds
        # Cells that another runner works on, and when to look again.
        self._elsewhere: dict[str, float] = {}

    def run(self, pool: Pool) -> Tally:
        """Compute what can be; returns what became of it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("cells", total=len(self.todo), eta="")
            while self.todo:
                self._leave_hopeless()
                while pool.free and (job := self._next(pool)) is not None:
                    pool.start(job)
                if not pool.running and (self._late() or not (self._waits() or self._open(pool))):
                    break
                for outcome in pool.wait(_LOOK):
                    self._take(outcome, progress)
                left = in_words(self._left())
                progress.update(task, completed=self._count(), total=self._count() + len(self.todo), eta=f"{left} left")
        for cell_id in list(self.todo):
            self.tally.left[cell_id] = "the time given by --max-minutes was up, or too little of it left"
        return self.tally

    def _open(self, pool: Pool) -> list[Cell]:
        """The cells that could be begun now, seed by seed, so that what there is when time is up is whole; of one seed
        pretrainings first, as others wait for them, and then what takes longest."""
        if self._late():
            return []
        now = time.monotonic()
        running = set(pool.running)
        ready = [
            cell
            for cell in self.todo.values()
            if cell.id not in running
            and self._fits(cell)
            and self._elsewhere.get(cell.id, now) <= now
            and not any(need in self.todo for need in cell.needs)
        ]
        first = {seed: place for place, seed in enumerate(self.study.grid.seeds)}

        def order(cell: Cell) -> tuple[int, bool, float]:
            return first.get(cell.settings.get("seed", -1), -1), cell.kind != "pretrain", -self.estimate.seconds(cell)

        return sorted(ready, key=order)

    def _next(self, pool: Pool) -> Job | None:
        ready = self._open(pool)
        if not ready:
            return None
        cell = ready[0]
        return Job(
            cell=cell,
            needed={need: self.cells[need] for need in cell.needs},
            command=f"{self.command} --only {cell.id} --again",
            again=cell.id in self.again,
            since=self._began,
        )

    def _take(self, outcome: Outcome, progress: Progress) -> None:
        cell = self.todo[outcome.cell]
        if outcome.state == "busy":
            if outcome.cell not in self._elsewhere:
                progress.console.print(f"{cell.id}: another process works on it")
            self._elsewhere[cell.id] = time.monotonic() + _LOOK
            return
        del self.todo[cell.id]
        self._elsewhere.pop(cell.id, None)
        if outcome.state == "done":
            self.tally.done.append(cell.id)
            self.estimate.add(cell, outcome.seconds)
            said = (
                f"{in_words(outcome.seconds)}; {in_words(self._left())} left"
                if self.todo
                else in_words(outcome.seconds)
            )
            progress.console.print(f"{cell.id}: done in {said}", highlight=False)
        elif outcome.state == "found":
            self.tally.found.append(cell.id)
            progress.console.print(f"{cell.id}: done by another process", highlight=False)
        elif outcome.state == "stopped":
            self.tally.left[cell.id] = outcome.reason
            progress.console.print(f"{cell.id}: {outcome.reason}", highlight=False, markup=False)
        else:
            self._fail(cell, outcome.reason, progress)

    def _fail(self, cell: Cell, reason: str, progress: Progress) -> None:
        # A process that died wrote none, and one of an earlier failure may stand there.
        if self.store.failure(cell) != reason:
            self.store.write_failure(cell, reason)
        self.tally.failed[cell.id] = reason
        last = reason.splitlines()[-1] if reason else "no reason given"
        where = escape(str(self.store.failure_path(cell.id)))
        progress.console.print(f"[red]{cell.id}: failed:[/red] {escape(last)} (see {where})", highlight=False)

    def _leave_hopeless(self) -> None:
        """Give up what needs a cell that failed."""
        for cell in list(self.todo.values()):
            gone = next((n for n in cell.needs if n in self.tally.failed or n in self.tally.left), None)
            if gone is not None:
                del self.todo[cell.id]
                self.tally.left[cell.id] = f"{gone}, which it needs, is not there"

    def _waits(self) -> bool:
        """Whether there is a cell elsewhere that could be done here yet."""
        return any(cell_id in self._elsewhere and self._fits(cell) for cell_id, cell in self.todo.items())

    def _fits(self, cell: Cell) -> bool:
        return cell.kind == "pretrain" or self.estimate.seconds(cell) <= self._remaining()

    def _late(self) -> bool:
        return self._remaining() <= 0

    def _remaining(self) -> float:
        return math.inf if self._deadline is None else self._deadline - time.monotonic()

    def _count(self) -> int:
        tally = self.tally
        return len(tally.done) + len(tally.found) + len(tally.failed) + len(tally.left)

    def _left(self) -> float:
        return self.estimate.left(self.todo, self.jobs)


def command_of(file: Path) -> str:
    """How the study of `file` is run, with a path that says nothing of this machine."""
    try:
        shown = file.resolve().relative_to(Path.cwd())
    except ValueError:
        shown = Path(file.name)
    return f"fastmoco study {shown}"
