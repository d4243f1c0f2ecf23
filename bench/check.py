"""Has anything become slower? Results of benchmarks beside older ones of them, by ratios and beyond noise."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastmoco.errors import UserError

# Beyond noise in three of a thousand rows that are as fast as before.
DEVIATIONS = 3.0
# What a row is known by, of those fields that it has: what was run, not what came of it nor where.
IDENTITY = (
    "op", "implementation", "operation", "pass", "dtype", "arch", "size", "batch", "workers", "images", "loader", "N",
    "K", "D", "C", "side", "grid", "stages", "off_diagonal", "parameters", "tensors", "views", "cuda_graph",
)  # fmt: skip

# Their rows are of ours, whatever they are called, but for the baseline.
_OF_OURS = ("step", "views")

Row = dict[str, Any]


@dataclass(kw_only=True)
class CheckArgs:
    """Compare two runs of a benchmark, or of all; exit status 1 where a row of ours has become slower.

    What is compared is how many times as fast as its baseline, timed in turn with it, a row is: other machines and
    loads change that little. Slower is what lies beyond the noise of both, as the spread of their repeats gives it.
    """

    old: tyro.conf.Positional[Path]
    """Results as they were: a JSON file, or the folder of `make bench`."""
    new: tyro.conf.Positional[Path]
    """Results as they are; likewise."""
    least: float = 0.05
    """Share of a ratio that is no change, whatever the noise."""
    common: bool = False
    """Pass over rows that only the old results have: those of `make bench-full` beside `make bench`."""


@dataclass(frozen=True)
class Change:
    """A row of both files: how many times as fast as before it is, and the share of that which noise explains."""

    name: str
    factor: float
    noise: float

    def verdict(self, least: float) -> str:
        """slower, faster, or as before."""
        bound = max(self.noise, least)
        if math.log(self.factor) < -bound:
            return "slower"
        return "faster" if math.log(self.factor) > bound else "as before"


def load(path: Path) -> list[Row]:
    """The rows of one file. Raises UserError for what is no benchmark's JSON."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the JSON file of a benchmark: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not the JSON file of a benchmark: it holds no list of rows")
    return rows


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of ours in a file, or in the files of a folder, that have a ratio, by what was run.

    Raises UserError for what is no benchmark's JSON, and where there is no such row.
    """
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for row in load(file):
            if is_ours(row) and row.get("ratio") is not None:
                found[", ".join(str(row[name]) for name in IDENTITY if row.get(name) is not None)] = row
    if not found:
        raise UserError(f"{path}: no row of ours with a ratio in it")
    return found


def is_ours(row: Row) -> bool:
    """Whether a row is of this package, and not of a peer."""
    name = str(row.get("implementation", ""))
    if row.get("op") in _OF_OURS:
        return not name.startswith("paper")
    return name.startswith(("fastmoco", "our operations"))


def noise(row: Row) -> float:
    """The deviation of a row's ratio as a share of it: of the median of its repeats, and as much of the baseline's.

    Of a normal distribution the 20th and the 80th percentile lie 1.68 deviations apart, and the median of n values has
    a deviation of 1.25 over the root of n.
    """
    if "p50_ms" in row:
        spread, repeats = (row["p80_ms"] - row["p20_ms"]) / row["p50_ms"], row.get("rounds", 1)
    elif "pairs_per_s" in row:
        spread, repeats = (row["fast_pairs_per_s"] - row["slow_pairs_per_s"]) / row["pairs_per_s"], row["turns"]
    else:
        spread, repeats = (row["ours_p80_ms"] - row["ours_p20_ms"]) / row["ours_ms"], row.get("rounds", 1)
    return float(math.sqrt(2) * 1.25 * spread / 1.68 / math.sqrt(repeats))


def compare(old: dict[str, Row], new: dict[str, Row]) -> list[Change]:
    """Each row that both have."""
    return [
        Change(name, new[name]["ratio"] / row["ratio"], DEVIATIONS * math.hypot(noise(row), noise(new[name])))
        for name, row in old.items()
        if name in new
    ]


def main(args: CheckArgs) -> int:
    """Print what changed; 1 where something is slower or has gone."""
    old, new = read_rows(args.old), read_rows(args.new)
    changes = compare(old, new)
    slower = [change for change in changes if change.verdict(args.least) == "slower"]
    for change in sorted(changes, key=lambda change: change.factor):
        if (verdict := change.verdict(args.least)) != "as before":
            print(f"{verdict}: {change.name}: {change.factor:.2f} times as fast (noise {100 * change.noise:.0f} %)")
    gone = [] if args.common else [name for name in old if name not in new]
    for name in gone:
        print(f"gone: {name}")
    print(f"{len(changes)} rows compared, {len(slower)} slower, {len(gone)} gone")
    return int(bool(slower or gone))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(CheckArgs, prog="python -m bench.check")))
    except UserError as error:
        sys.exit(f"error: {error}")
