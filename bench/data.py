"""How many pairs of views a second come out of each loader, and what do they cost?

MoCo v2's views of generated JPEGs and, with --images, of your own. Each loader runs in a process of its own and takes
turns with the others. The agreement of what they load is printed before any speed; no speed where they disagree.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.command import start
from bench.floors import FLOORS
from bench.loaders import (
    BASELINE,
    DEFINITION,
    LOADERS,
    OURS,
    Setting,
    first_views,
    read_generated,
    read_manifest,
    statistics,
)
from bench.photographs import COUNT, SIDE, draw_photographs, mean_bytes
from bench.plot import save_speeds
from bench.timing import environment, save
from bench.turns import Contestant, Missing, Turn, as_rows, rounds, summary, take_turn
from fastmoco.data.manifest import Manifest
from fastmoco.errors import UserError
from fastmoco.train.recipes import find

PRELOAD = ("torch", "torchvision.transforms.v2", "bench.loaders", "bench.floors", "bench.plot", "tyro")
# Mean over a view of |difference|, in 255ths, between one of our loaders and torchvision's transforms of what Pillow
# decodes, given the same draws: decoders differ by so much in a JPEG's chroma, and views agree to a hundredth of it.
SAME_VIEWS = 1.0
# Batches of which views are compared one by one.
BATCHES = 2
# Means and standard deviations of the views, in standard errors of their difference.
SAME_STATISTICS = 4.0
COLUMNS = ["images", "implementation", "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s", "ratio"]
COLUMNS += ["cpu_ms_per_pair", "peak_mb", "first_s", "again_s", "parity"]


@dataclass(kw_only=True)
class DataArgs:
    """Measure pairs a second, processor time a pair, memory and the time to the first batch of every loader."""

    images: tuple[Path, ...] = ()
    """Folders of images to load too."""
    sets: int | None = None
    """So many sets of images alone: first the generated ones of 512 pixels, then those of 1,024, then yours."""
    generated: Path | None = None
    """Folder with the generated images of 512 pixels, where they have been drawn before."""
    quick: bool = False
    """One small generated set, small views and short turns: a check that all of it runs, not a measurement."""
    size: int = 224
    """Side of a view, pixels."""
    batch_size: int = 16
    """Pairs a batch."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, or processes in loaders that use processes."""
    device: str = "cpu"
    """Device on which batches are wanted; on a GPU DALI decodes there, and ours cuts the views there."""
    seconds: float = 1.0
    """Length of a turn."""
    rounds: int = 3
    """Turns of each loader."""
    out: Path | None = None
    """Markdown file to write; the rows are put beside it as JSON, and a plot."""


class Loading:
    """One loader, or one part of one, at work in its own process. Built with a name of `LOADERS` or `FLOORS`."""

    def __init__(self, name: str, setting: Setting) -> None:
        # The draws of the others, so that their statistics are the same in every run.
        torch.manual_seed(0)
        everything: dict[str, Callable[[Setting], AbstractContextManager[Iterator[Any]]]] = {**LOADERS, **FLOORS}
        self._open = everything[name]
        self._setting = setting
        self._open(setting)  # Missing is raised here

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`."""
        batch, workers = self._setting.batch_size, self._setting.workers
        finish = torch.cuda.synchronize if self._setting.device != "cpu" else lambda: None
        return take_turn(
            self._open(self._setting), lambda _: batch, seconds=seconds, burst=max(workers, 1), finish=finish
        )

    def statistics(self, pairs: int) -> np.ndarray:
        """As `bench.loaders.statistics`."""
        return statistics(self._open, self._setting, pairs)

    def definition(self, batches: int) -> np.ndarray:
        """The first views that the definition makes."""
        return first_views(DEFINITION, self._setting, batches)

    def apart(self, batches: int, definition: np.ndarray) -> float:
        """The greatest mean |difference|, in 255ths, of a view from what the definition makes with the same draws."""
        return float(np.abs(first_views(self._open, self._setting, batches) - definition).mean((1, 2, 3)).max() * 255)


class Asked(Protocol):
    """What answers for a loader: a `Contestant`."""

    def ask(self, method: str, *args: object) -> Any:
        """What `method` of its `Loading` returns."""


def agreement(
    contestants: Mapping[str, Asked], definition: np.ndarray, pairs: int, say: Callable[[str], None]
) -> dict[str, bool]:
    """Which loaders load what they should, by `pairs` pairs of each; every difference and its limit is said.

    Each one's views must have the baseline's statistics; ours must be those of `definition`, given the same draws.
    """
    reference = contestants[BASELINE].ask("statistics", pairs)
    agreed = {BASELINE: True}
    for name in LOADERS:
        if name not in contestants or name == BASELINE:
            continue
        errors = deviations(contestants[name].ask("statistics", pairs), reference)
        say(f"  {name}: statistics off by {errors:.2g} standard errors (limit {SAME_STATISTICS:g})")
        agreed[name] = errors <= SAME_STATISTICS
        if name in OURS:
            apart = contestants[name].ask("apart", BATCHES, definition)
            say(f"  {name}: {apart:.2g} 255ths from torchvision with the same draws (limit {SAME_VIEWS:g})")
            agreed[name] &= apart <= SAME_VIEWS
        if not agreed[name]:
            say(f"  {name}: PARITY FAILS, no speed is shown")
    return agreed


def deviations(some: np.ndarray, others: np.ndarray) -> float:
    """The largest difference of the columns' means, in its standard errors. Infinite where anything is not finite."""
    variance = some.var(0, ddof=1) / len(some) + others.var(0, ddof=1) / len(others)
    errors = np.abs(some.mean(0) - others.mean(0)) / np.sqrt(variance)
    return float(errors.max()) if np.isfinite(errors).all() else float("inf")


def measure(name: str, setting: Setting, args: DataArgs, console: Console) -> list[dict[str, Any]]:
    """Rows for the images called `name`; those of loaders that disagree have no speed."""
    # Once for all of ours, as it takes longer than loading the same; elsewhere, as it adds to a process's memory.
    with Contestant(Loading, BASELINE, setting, preload=PRELOAD) as maker:
        definition = maker.ask("definition", BATCHES)
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for loader in (*LOADERS, *FLOORS):
            try:
                contestants[loader] = stack.enter_context(Contestant(Loading, loader, setting, preload=PRELOAD))
            except Missing as reason:
                console.print(f"  {loader}: left out, {reason}")
        agreed = agreement(contestants, definition, 32 if args.quick else 128, console.print)
        for loader in [loader for loader, agrees in agreed.items() if not agrees]:
            contestants.pop(loader).close()
        turns = rounds(contestants, "turn", args.seconds, count=args.rounds)
    rows: list[dict[str, Any]] = []
    what = {"images": name, "size": args.size, "batch": args.batch_size, "workers": args.workers}
    base = summary(turns[BASELINE])["pairs_per_s"]
    for loader in (*LOADERS, *FLOORS):
        row: dict[str, Any] = {"op": "data", "implementation": loader, **what}
        row["parity"] = {True: "agrees", False: "FAILS", None: None}[agreed.get(loader)]
        if loader in turns:
            figures = summary(turns[loader])
            row |= figures | {"ratio": figures["pairs_per_s"] / base, "every_turn": as_rows(turns[loader])}
        rows.append(row | environment(args.device))
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table for each set of images."""
    for images in dict.fromkeys(row["images"] for row in rows):
        table = Table(title=f"{images}: pairs of views from files")
        headings = ("loader", "pairs/s", "20 to 80 %", "to PIL", "CPU ms", "MB", "first s, again")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "loader" else "right", no_wrap=True)
        for row in (row for row in rows if row["images"] == images):
            if "pairs_per_s" not in row:
                table.add_row(row["implementation"], *("-" for _ in headings[1:]))
                continue
            table.add_row(
                row["implementation"],
                f"{row['pairs_per_s']:.1f}",
                f"{row['slow_pairs_per_s']:.0f}-{row['fast_pairs_per_s']:.0f}",
                f"{row['ratio']:.2f}x",
                f"{row['cpu_ms_per_pair']:.1f}",
                f"{row['peak_mb']:.0f}",
                f"{row['first_s']:.2f} {row['again_s']:.2f}",
            )
        console.print(table)


def sets(args: DataArgs, folder: Path) -> Iterator[tuple[str, Manifest]]:
    """The images to load, by the name that the table gives them."""
    for side, count in ((128, 24),) if args.quick else ((SIDE, COUNT), (1024, 96)):
        images = folder / str(side)
        if side == SIDE and args.generated is not None:
            manifest = read_generated(args.generated)
        else:
            draw_photographs(images, count, side)
            manifest = read_manifest(images)
        # Of the images alone, whatever else lies there.
        mean = mean_bytes([manifest.path(index) for index in range(len(manifest))])
        yield f"generated {np.median(manifest.sizes):.0f} px, {mean / 1000:.0f} kB", manifest
    for given in args.images:
        manifest = read_manifest(given)
        height, width = np.median(manifest.sizes, axis=0).astype(int)
        yield f"{given.name or given.resolve().name}, {height} x {width} px", manifest


def main(args: DataArgs) -> int:
    """Run the benchmark; status 1 where parity fails."""
    if args.generated is not None and args.quick:
        raise UserError("--generated: the images of --quick are smaller ones; leave one of both out")
    console = Console(width=120, highlight=False)
    views = find("mocov2")(Path(), Path()).views
    if args.quick:
        args = replace(args, size=64, batch_size=4, seconds=0.1, rounds=2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # What is found out about the generated files is of no use to anybody later.
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        for name, manifest in islice(sets(args, Path(folder)), args.sets):
            console.print(f"{name}, {len(manifest)} files")
            setting = Setting(manifest, replace(views, size=args.size), args.batch_size, args.workers, args.device)
            rows += measure(name, setting, args, console)
    show(rows, console)
    if args.out is not None:
        options = f"--size {args.size} --batch-size {args.batch_size} --workers {args.workers} --device {args.device}"
        save(
            rows,
            args.out,
            title=f"Loading pairs of views: MoCo v2's at {args.size} px",
            command=f"python -m bench.data {options} --seconds {args.seconds} --rounds {args.rounds}"
            + (f" --images {' '.join(path.name for path in args.images)}" if args.images else ""),
            columns=COLUMNS,
        )
        console.print(save_speeds(rows, args.out.with_suffix(".png"), title="Pairs of views a second, from files"))
    return 1 if any(row["parity"] == "FAILS" for row in rows) else 0


if __name__ == "__main__":
    start(main, DataArgs, "data")
