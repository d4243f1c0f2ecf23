"""`fastmoco study CONFIG`: the grid computed, or on with it, and the report written."""

from __future__ import annotations

import fnmatch
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import tyro
from rich.console import Console

from fastmoco.arguments import read_arguments
from fastmoco.device import device_name, find_device
from fastmoco.errors import UserError
from fastmoco.study.cell import Cell, digest
from fastmoco.study.cells import make_cells
from fastmoco.study.config import Study, read_study
from fastmoco.study.estimate import Estimate, in_words
from fastmoco.study.pool import Pool
from fastmoco.study.runner import Runner, Tally, command_of
from fastmoco.study.store import Damaged, Record, Store
from fastmoco.study.work.context import prepare
from fastmoco.study.work.encoders import is_whole

FAILED, UNFINISHED = 1, 3
MakePool = Callable[[Study, int, str], Pool]
_REASONS_SHOWN = 5


@dataclass(kw_only=True, slots=True)
class StudyArgs:
    """Compare methods on data, label budgets and seeds, as a TOML file says, and write a report.

    What is computed is kept in the study's folder, cell by cell: started again, the command goes on where it was, and
    several started at once, on machines that share the folder, share the work. Exit status: 0 where every cell is
    computed, 1 where one failed, 3 where some are left."""

    config: tyro.conf.Positional[Path]
    """TOML file with the tables [study], [[data]], [pretrain], [finetune], [probes] and [leaks]."""
    only: tuple[str, ...] = ()
    """Compute only the cells whose names match one of these patterns (* and ?), and those that they need."""
    again: bool = False
    """Compute the cells that match --only also where they are finished."""
    list: bool = False
    """List the cells, and which are finished, and stop."""
    report: Literal["after", "only", "none"] = "after"
    """Write the report after the cells; write it of what is finished and stop, which needs neither images nor encoders;
    or write none."""
    out: Path | None = None
    """Folder of the study; as the file says if not given. With --report only: that of the cells to report on."""
    max_minutes: float | None = None
    """Begin no cell after so many minutes, nor one that would then be under way, unless it pretrains, which it goes on
    with later."""
    jobs: int | None = None
    """Cells computed at a time; as the file says if not given."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... or auto; as the file says if not given."""

    def __post_init__(self) -> None:
        if self.again and not self.only:
            raise UserError("--again computes finished cells again: say which with --only ('*' for all)")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}")
        if self.max_minutes is not None and self.max_minutes < 0:
            raise UserError(f"--max-minutes must be 0 or more, not {self.max_minutes}")


def read_options(args: list[str]) -> StudyArgs:
    """The options that `args` make. Raises UserError, or exits with 2, for a mistake."""
    return read_arguments(StudyArgs, prog="fastmoco study", args=args)


def study_command(args: StudyArgs, *, pool: MakePool = Pool) -> int:
    """Do what `args` say, cells by the processes of `pool`; returns the exit status.

    Raises UserError for a mistake in the file or the options.
    """
    return compute(read_study(args.config), args, pool=pool)


def compute(study: Study, args: StudyArgs, *, pool: MakePool = Pool) -> int:
    """As `study_command`, of `study` in place of what the file says."""
    grid = study.grid
    grid = replace(grid, out=args.out or grid.out, jobs=args.jobs or grid.jobs, device=args.device or grid.device)
    study = replace(study, grid=grid)
    store, console = Store(study.out), Console(soft_wrap=True)
    if args.report == "only":
        cells = make_cells(study, _stored_prints(study, store))
        return _finish(study, store, cells, Tally(), console, command=_command(args))
    store.make()
    prepared = {data.name: prepare(study, data) for data in study.data}
    cells = make_cells(study, {name: own.print for name, own in prepared.items()})
    chosen = _chosen(cells, args.only)
    records = _finished(store, cells, console)
    if args.list:
        for cell_id in chosen:
            state = "finished" if cell_id in records else "failed" if store.failure(cells[cell_id]) else "to do"
            print(f"{cell_id}\t{state}")
        return 0
    again = frozenset(chosen) if args.again else frozenset()
    todo = to_do(store, cells, chosen, records, again)
    tally = Tally()
    if todo:
        with store.shared(digest({cell.id: cell.hash for cell in cells.values()})):
            for data in study.data:
                prepared[data.name].write(store, data)
            tally = _run(study, store, cells, todo, again, records, args, console, pool)
    return _finish(study, store, cells, tally, console, command=_command(args) if args.report == "after" else None)


def _command(args: StudyArgs) -> str:
    """How the cells are computed: the file, and the options that say what computes them."""
    options = {"--device": args.device, "--jobs": args.jobs}
    return " ".join([command_of(args.config), *(f"{k} {v}" for k, v in options.items() if v is not None)])


def to_do(
    store: Store, cells: Mapping[str, Cell], chosen: list[str], records: Mapping[str, Record], again: frozenset[str]
) -> dict[str, Cell]:
    """Of the `chosen` cells those that are not finished or wanted `again`, and those that they need and cannot do
    without: also a finished pretraining whose encoder is gone."""
    wanted: set[str] = set()

    def add(cell: Cell) -> None:
        wanted.add(cell.id)
        for need in cell.needs:
            if not is_whole(store, cells[need]):
                add(cells[need])

    for cell_id in chosen:
        if cell_id not in records or cell_id in again:
            add(cells[cell_id])
    return {cell_id: cell for cell_id, cell in cells.items() if cell_id in wanted}


def _chosen(cells: Mapping[str, Cell], patterns: tuple[str, ...]) -> list[str]:
    if not patterns:
        return list(cells)
    for pattern in patterns:
        if not fnmatch.filter(cells, pattern):
            raise UserError(
                f"--only {pattern}: matches none of the {len(cells)} cells; --list shows them, as {next(iter(cells))}"
            )
    return [cell_id for cell_id in cells if any(fnmatch.fnmatchcase(cell_id, p) for p in patterns)]


def _finished(store: Store, cells: Mapping[str, Cell], console: Console) -> dict[str, Record]:
    records = {}
    for cell in cells.values():
        try:
            record = store.read(cell.id)
        except Damaged as damaged:
            console.print(f"damaged, to be computed again: {damaged}", highlight=False, markup=False)
            continue
        if record is None:
            continue
        if record["hash"] == cell.hash:
            records[cell.id] = record
        else:
            console.print(f"{cell.id}: its settings have changed; it is computed again", highlight=False)
    return records


def _run(
    study: Study,
    store: Store,
    cells: Mapping[str, Cell],
    todo: dict[str, Cell],
    again: frozenset[str],
    records: Mapping[str, Record],
    args: StudyArgs,
    console: Console,
    make_pool: MakePool,
) -> Tally:
    device = find_device(study.grid.device)
    with make_pool(study, study.grid.jobs, str(device)) as pool, _ended_by_signals():
        sides = {int(cell.settings["data"]["size"]) for cell in todo.values()}
        trials = {side: pool.trial(side) for side in sides}
        estimate = Estimate(trials)
        estimate.add_all(cells.values(), records, device_name(device))
        time = in_words(estimate.left(todo, study.grid.jobs))
        console.print(
            f"{len(todo)} of {len(cells)} cells are to be computed on {device} by {study.grid.jobs} at a time: "
            f"about {time}, by {'cells that are finished' if records else 'a short trial'}",
            highlight=False,
        )
        runner = Runner(
            study,
            store,
            cells,
            todo,
            estimate=estimate,
            command=_command(args),
            jobs=study.grid.jobs,
            again=again,
            most_seconds=None if args.max_minutes is None else 60 * args.max_minutes,
            console=console,
        )
        try:
            return runner.run(pool)
        except KeyboardInterrupt:
            console.print("the same command, started again, goes on where this one was", highlight=False)
            raise


def _finish(
    study: Study, store: Store, cells: Mapping[str, Cell], tally: Tally, console: Console, *, command: str | None
) -> int:
    """Say what is missing, and write the report where there is the `command` that it is of; the exit status."""
    if tally.failed:
        console.print(f"{len(tally.failed)} cells failed:", highlight=False)
        for cell_id, reason in list(tally.failed.items())[:_REASONS_SHOWN]:
            console.print(f"  {cell_id}: {reason.splitlines()[-1]}", highlight=False, markup=False)
    missing = [cell.id for cell in cells.values() if store.finished(cell) is None]
    if missing:
        said = f"{len(missing)} of {len(cells)} cells are still to be computed: start the command again"
        console.print(said, highlight=False)
    if command is not None:
        from fastmoco.study.report.build import write_report

        paths = write_report(study, store, cells, command)
        console.print(f"report: {', '.join(str(path) for path in paths)}", highlight=False, markup=False)
    return FAILED if tally.failed else UNFINISHED if missing else 0


def _stored_prints(study: Study, store: Store) -> dict[str, dict[str, Any]]:
    """What identifies the data, as the cells say that were computed of them."""
    prints = {}
    for data in study.data:
        try:
            record = store.read(f"{data.name}.data")
        except Damaged as damaged:
            raise UserError(f"--report only: {damaged}; run the study first") from damaged
        if record is None:
            where = store.path(f"{data.name}.data")
            raise UserError(f"--report only: {where} is not there, so nothing is known of {data.name}; run the study")
        prints[data.name] = record["result"]["print"]
    return prints


class _ended_by_signals:
    """SIGTERM as Ctrl-C, for a while: what runs is told to save and end."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:
        print("asked to end: what pretrains saves first", file=sys.stderr)
        raise KeyboardInterrupt
