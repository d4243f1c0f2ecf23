"""Has anything become slower? Results of benchmarks beside older ones of them, by ratios and beyond noise."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import tyro
from scipy.special import stdtrit

from bench.command import start
from fastmoco.errors import UserError

# The share of rows as fast as before that are taken for slower: what a normal ratio's noise is bounded by.
FALSE_ALARMS = 0.005
# What a row is known by, of those fields that it has: what was run, not what came of it nor where.
IDENTITY = (
    "op", "implementation", "operation", "pass", "dtype", "recipe", "arch", "size", "batch", "workers", "device",
    "images", "loader", "N", "K", "D", "C", "side", "grid", "stages", "off_diagonal", "parameters", "tensors", "views",
    "cuda_graph",
)  # fmt: skip

# Their rows are of ours, whatever they are called, but for the baseline.
_OF_OURS = ("step", "views")

Row = dict[str, Any]


@dataclass(kw_only=True)
class CheckArgs:
    """Compare two runs of a benchmark, or of all; exit status 1 where a row of ours is slower or gone, or none in both.

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
class Noise:
    """The standard deviation of a logarithm of a speed or a ratio, as estimated with so many degrees of freedom."""

    deviation: float
    freedom: float

    def __add__(self, other: Noise) -> Noise:
        """That of the sum of two that are independent; Welch's and Satterthwaite's degrees of freedom."""
        deviation = math.hypot(self.deviation, other.deviation)
        uncertain = sum(one.deviation**4 / one.freedom if one.deviation else 0.0 for one in (self, other))
        return Noise(deviation, deviation**4 / uncertain if uncertain else math.inf)

    @property
    def bound(self) -> float:
        """What noise alone exceeds on one side in FALSE_ALARMS of cases: of Student's distribution."""
        if not 0 < self.deviation < math.inf:
            return self.deviation
        return self.deviation * -float(stdtrit(self.freedom, FALSE_ALARMS))


@dataclass(frozen=True)
class Timed:
    """A row's ratio and its noise."""

    ratio: float
    noise: Noise


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


def read_rows(path: Path) -> dict[str, Timed]:
    """The rows of ours in a file, or in the files of a folder, that have a ratio, by what was run.

    Raises UserError for what is no benchmark's JSON or not there, and where there is no such row.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    found = {}
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        rows = [row for row in load(file) if row.get("ratio") is not None]
        # The baseline of rows that have one: as fast as itself.
        baselines = {named(row, of="case"): row for row in rows if row["ratio"] == 1}
        for row in filter(is_ours, rows):
            noise = row_noise(row, baselines.get(named(row, of="case"), row))
            found[named(row, of="row")] = Timed(row["ratio"], noise)
    if not found:
        raise UserError(f"{path}: no row of ours with a ratio in it")
    return found


def named(row: Row, *, of: Literal["row", "case"]) -> str:
    """What was run; of the case, whatever ran it."""
    left_out = ("implementation", "loader") if of == "case" else ()
    return ", ".join(str(row[name]) for name in IDENTITY if row.get(name) is not None and name not in left_out)


def is_ours(row: Row) -> bool:
    """Whether a row is of this package, and not of a peer."""
    name = str(row.get("implementation", ""))
    if row.get("op") in _OF_OURS:
        return not name.startswith("paper")
    return name.startswith(("fastmoco", "our operations"))


@functools.cache
def expected_spread(repeats: int) -> float:
    """So many standard deviations the 20th and the 80th percentile of `repeats` normal values lie apart on average:
    0.7 of 2, 1.05 of 3, 1.68 of very many.

    The percentiles, interpolated as numpy does, of the expected order statistics by Blom's formula (Statistical
    Estimates and Transformed Beta-Variables, 1958), which is up to 5 % off.
    """
    expected = [NormalDist().inv_cdf((i - 0.375) / (repeats + 0.25)) for i in range(1, repeats + 1)]
    low, high = np.percentile(expected, (20, 80))
    return float(high - low)


def median_noise(spread: float, repeats: int) -> Noise:
    """That of the median of values whose 20th and 80th percentile lie `spread` apart; unbounded for one value.

    The median of n normal values has a deviation of at most 1.25 over the root of n.
    """
    if repeats < 2:
        return Noise(math.inf, 1.0)
    return Noise(1.25 * spread / expected_spread(repeats) / math.sqrt(repeats), repeats - 1.0)


def row_noise(row: Row, baseline: Row) -> Noise:
    """That of a row's ratio: of the median of its own repeats and of its baseline's."""
    if "ours_ms" in row:
        repeats = row.get("rounds", 1)
        return sum_of(
            median_noise((row[f"{who}_p80_ms"] - row[f"{who}_p20_ms"]) / row[f"{who}_ms"], repeats)
            for who in ("ours", "torchvision")
        )
    return sum_of(median_noise(*_spread(one)) for one in (row, baseline))


def sum_of(parts: Iterable[Noise]) -> Noise:
    """Of all that are independent."""
    return functools.reduce(Noise.__add__, parts)


def _spread(row: Row) -> tuple[float, int]:
    """The 20th to the 80th percentile as a share of the median, and of how many repeats."""
    if "p50_ms" in row:
        return (row["p80_ms"] - row["p20_ms"]) / row["p50_ms"], row.get("rounds", 1)
    return (row["fast_pairs_per_s"] - row["slow_pairs_per_s"]) / row["pairs_per_s"], row["turns"]


def compare(old: dict[str, Timed], new: dict[str, Timed]) -> list[Change]:
    """Each row that both have."""
    return [
        Change(name, new[name].ratio / row.ratio, (row.noise + new[name].noise).bound)
        for name, row in old.items()
        if name in new
    ]


def main(args: CheckArgs) -> int:
    """Print what changed; 1 where something is slower or has gone, or nothing could be compared."""
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
    if not changes:
        print(f"nothing was compared: no row of {args.old} is in {args.new}; are both of the same options and machine?")
    return int(bool(slower or gone or not changes))


if __name__ == "__main__":
    start(main, CheckArgs, "check")
