"""`fastmoco slurm speeds`: the speeds that slurm/bench.sbatch found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

from fastmoco.arguments import read_arguments
from fastmoco.errors import UserError
from fastmoco.train.metrics import read_rows


@dataclass(kw_only=True)
class SpeedsArgs:
    """Show the speeds of the runs in a folder, named processes-1, processes-2, ..., against the smallest."""

    folder: tyro.conf.Positional[Path]
    """Folder of the runs."""


def speeds_command(args: list[str]) -> int:
    """Print the table. Returns the exit status, 0; raises UserError where there is nothing to show."""
    folder = read_arguments(SpeedsArgs, prog="fastmoco slurm speeds", args=args).folder
    found = {int(run.name.partition("-")[2]): speed_of(run) for run in folder.glob("processes-*")}
    if not found:
        raise UserError(f"{folder}: no run named processes-1, processes-2 ... in it")
    table = Table(box=None, pad_edge=False)
    for heading in ("processes", "pairs/s", "pairs/s each", "efficiency"):
        table.add_column(heading, justify="right")
    fewest = min(found)
    for processes, speed in sorted(found.items()):
        each = speed / processes
        table.add_row(str(processes), f"{speed:,.1f}", f"{each:,.1f}", f"{each / (found[fewest] / fewest):.1%}")
    Console(width=100).print(table)
    return 0


def speed_of(run: Path) -> float:
    """Median pairs a second of `run`, over the later half of its readings. Raises UserError where it has none."""
    speeds = [float(row["pairs_per_s"]) for row in read_rows(run / "metrics.jsonl") if row.get("pairs_per_s")]
    if not speeds:
        raise UserError(f"{run}: no speed in its metrics.jsonl; give it more steps than --log-every")
    return median(speeds[len(speeds) // 2 :])
