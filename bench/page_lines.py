"""The lines of the tables on the page of all benchmarks: the same whatever was measured."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import dropin, e2e, startup
from bench.check import load
from bench.loaders import LOADERS
from bench.parity import ALIKE
from bench.roofline import share
from bench.scaling import ScalingArgs
from bench.shares import BENCHMARKS, chosen
from bench.step import PAPER, VARIANTS
from bench.timing import cell

Row = dict[str, Any]
# Of each operation the other implementations that stand beside it: lightly's, and the fastest of torch's own.
LIGHTLY = {"infonce": "lightly NTXentLoss", "crosscorr": "lightly BarlowTwinsLoss"}
TORCH = {"infonce": "attention, queue in slices", "ema": "torch._foreach_lerp_", "sgd_ema": "SGD(fused), foreach"}
NAMES = {
    "infonce": "InfoNCE",
    "crosscorr": "cross-correlation",
    "pooled_mse": "pooled MSE",
    "ema": "moving average",
    "sgd_ema": "SGD and moving average",
}
OPERATIONS = ("infonce", "crosscorr", "pooled_mse", "ema")
RECIPES = ("mocov2: 512 to 224 px", "histology: 512 to 255 px", "fundus: 512 to 299 px", "chest-xray: 512 to 512 px")
PHOTOGRAPHS = "generated 512 px"
PEERS = ("lightly", "its formula in torch", "the paper's code", "a loop in torch")
RATES = ("gemm_float32_gflops", "gemm_bfloat16_gflops", "copy_gb_s", "exponentials_g_s")
# What the lines of `headline` are from.
HEADLINE_FILES = (*OPERATIONS, "views", "data", "step", "e2e", "dropin")
EAGER, OURS = next(iter(e2e.WAYS)), list(e2e.WAYS)[-1]


@dataclass(frozen=True)
class Results:
    """The JSON files of a folder; a file that is not there has no rows. Raises UserError for one that is damaged."""

    folder: Path

    @functools.cache  # noqa: B019 (a handful of folders in a process's life)
    def rows(self, name: str) -> list[Row]:
        """The rows of one file."""
        path = self.folder / f"{name}.json"
        return load(path) if path.is_file() else []

    def find(self, name: str, **wanted: object) -> Row:
        """The first row that has what is `wanted`; an empty one where there is none."""
        rows = self.rows(name)
        return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


@dataclass(frozen=True)
class Line:
    """One operation at one size: its rows by implementation, and ours among them."""

    name: str
    op: str
    sizes: str
    rows: dict[str, Row]
    ours: Row

    def times(self, other: str | None) -> float | None:
        """How many times as fast as `other` ours is."""
        return over(self.rows.get(other or "", {}).get("p50_ms"), self.ours.get("p50_ms"))

    def megabytes(self, row: Row) -> float | None:
        """The most that the operation needs beyond its inputs, by the allocator or the operating system."""
        known = [row[name] for name in ("peak_bytes", "resident_bytes") if row.get(name) is not None]
        return max(known) / 1e6 if known else None


def operations(results: Results) -> list[Line]:
    """Every operation at the sizes of the page."""
    lines = []
    for bench in BENCHMARKS:
        for case in bench.headline:
            wanted = {"op": bench.op, "dtype": case.dtype, **case.sizes}
            rows = results.rows("ema" if bench.op == "sgd_ema" else bench.op)
            own = {
                row["implementation"]: row
                for row in rows
                if all(row.get(key) == value for key, value in wanted.items())
            }
            own["baseline"] = own.get(bench.baseline, {})
            lines.append(Line(NAMES[bench.op], bench.op, str(case), own, chosen(list(own.values())) or {}))
    return lines


def over(numerator: float | None, denominator: float | None) -> float | None:
    """Their quotient; None where either was not measured, or is nothing."""
    return numerator / denominator if numerator and denominator else None


def spread(row: Row, middle: str, low: str, high: str, unit: float = 1.0) -> str:
    """A median with the range beside it, divided by `unit`."""
    if any(row.get(name) is None for name in (middle, low, high)):
        return "-"
    return "{} ({} to {})".format(*(cell(row[name] / unit) for name in (middle, low, high)))


def milliseconds(row: Row) -> str:
    return spread(row, "p50_ms", "p20_ms", "p80_ms")


def pairs(row: Row) -> str:
    return spread(row, "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s")


def parity(results: Results) -> Iterable[Sequence[object]]:
    for peer in PEERS:
        rows = [row for row in results.rows("parity") if row["peer"] == peer]
        # Of views that are alike only the distance from float64 is held.
        apart = [row for row in rows if row["noise"] != ALIKE]
        worst = [
            max((row[name] for row in some if row[name] is not None), default=None)
            for some, name in ((apart, "value"), (apart, "gradient"), (rows, "ours_off"), (rows, "peer_off"))
        ]
        held = all(row["holds"] for row in rows)
        yield (peer, len(rows) or None, *worst, ("yes" if held else "no") if rows else None)


def speeds(results: Results) -> Iterable[Sequence[object]]:
    for line in operations(results):
        peers = [line.times(other[line.op]) if line.op in other else "" for other in (LIGHTLY, TORCH)]
        yield (line.name, line.sizes, milliseconds(line.ours), line.times("baseline"), *peers)


def bytes_needed(results: Results) -> Iterable[Sequence[object]]:
    for line in operations(results):
        other = line.megabytes(line.rows.get(LIGHTLY[line.op], {})) if line.op in LIGHTLY else ""
        yield (line.name, line.sizes, line.megabytes(line.ours), line.megabytes(line.rows["baseline"]), other)


def shares(results: Results) -> Iterable[Sequence[object]]:
    for line in operations(results):
        row = line.ours
        part = share(row.get("floor_ms"), row.get("p50_ms"))
        yield (line.name, line.sizes, row.get("floor_ms"), row.get("p50_ms"), part, row.get("bound"))


def rates(results: Results) -> Iterable[Sequence[object]]:
    for file in OPERATIONS:
        row = results.find(file)
        yield (f"with {file}", *(row.get(name) for name in RATES))


def views(results: Results) -> Iterable[Sequence[object]]:
    for recipe in RECIPES:
        row = results.find("views", operation=recipe)
        ours, theirs = (spread(row, f"{who}_ms", f"{who}_p20_ms", f"{who}_p80_ms") for who in ("ours", "torchvision"))
        yield (recipe, ours, theirs, row.get("ratio"), row.get("ours_max"))


def loaded(results: Results) -> dict[str, Row]:
    """The loaders' rows, of photographs of 512 pixels."""
    rows = [row for row in results.rows("data") if str(row["images"]).startswith(PHOTOGRAPHS)]
    return {row["implementation"]: row for row in rows}


def loading(results: Results) -> Iterable[Sequence[object]]:
    rows = loaded(results)
    for name in LOADERS:
        row = rows.get(name, {})
        yield (name, pairs(row), row.get("ratio"), row.get("cpu_ms_per_pair"), row.get("peak_mb"), row.get("first_s"))


def step(results: Results) -> Iterable[Sequence[object]]:
    for name in (PAPER, *VARIANTS):
        row = results.find("step", implementation=name)
        yield (name, milliseconds(row), row.get("pairs_per_s"), row.get("ratio"), row.get("loss_error"))


def trained(results: Results, case: Any, way: str) -> Row:
    """The row of one way from files to weights, of the recipe, batch and queue that the page is of."""
    args = e2e.E2eArgs()
    return results.find(
        "e2e", implementation=way, recipe=args.recipe, arch=case.arch, size=case.size, batch=case.batch_size,
        K=args.queue_size,
    )  # fmt: skip


def end_to_end(results: Results) -> Iterable[Sequence[object]]:
    for case in e2e.cases(e2e.E2eArgs()):
        for way in e2e.WAYS:
            row = trained(results, case, way)
            yield (called(case), way, pairs(row), *(row.get(name) for name in e2e.BASES),
                   row.get("cpu_ms_per_pair"), row.get("peak_mb"))  # fmt: skip


def called(case: Any) -> str:
    """A case of the way from files to weights, in words."""
    return f"{case.arch}, {case.size} px, batch {case.batch_size}"


def drop_in(results: Results) -> Iterable[Sequence[object]]:
    for name in dropin.VARIANTS:
        row = results.find("dropin", implementation=name)
        yield (name, pairs(row), row.get("ratio"))


def start_up(results: Results) -> Iterable[Sequence[object]]:
    for name in startup.WHAT:
        row = results.find("startup", implementation=name)
        yield (name, spread(row, "p50_ms", "p20_ms", "p80_ms", unit=1e3))


def scaling(results: Results) -> Iterable[Sequence[object]]:
    for ranks in ScalingArgs().ranks:
        row = results.find("scaling", ranks=ranks)
        shared, alone = (spread(row, f"{how}_p50_ms", f"{how}_p20_ms", f"{how}_p80_ms") for how in ("shared", "alone"))
        yield (f"{ranks}", shared, alone, row.get("outside_ms"), row.get("sent_mb"))


def headline(results: Results) -> Iterable[Sequence[object]]:
    """The lines of the short table: how many times as fast as the plain form, as that with denormals flushed, and as
    lightly."""
    first = {line.op: line for line in reversed(operations(results))}
    # The moving average alone is the smaller part of what replaces it in training.
    del first["ema"]
    for op, line in reversed(first.items()):
        yield (f"{line.name}, {line.sizes}", line.times("baseline"), "",
               line.times(LIGHTLY[op]) if op in LIGHTLY else "")  # fmt: skip
    yield (f"a view, {RECIPES[0]}", results.find("views", operation=RECIPES[0]).get("ratio"), "", "")
    rows = loaded(results)
    ours = max((rows[name] for name in LOADERS if name.startswith("fastmoco") and name in rows),
               key=lambda row: float(row.get("pairs_per_s", 0)), default={})  # fmt: skip
    others = (rows.get(name, {}).get("pairs_per_s") for name in ("torchvision, PIL, denormals flushed", "lightly"))
    yield ("pairs of views from JPEGs of 512 px", ours.get("ratio"),
           *(over(ours.get("pairs_per_s"), other) for other in others))  # fmt: skip
    # Older rows do not say which of them is as a run is.
    ours = results.find("step", as_run=True) or results.find("step", implementation=list(VARIANTS)[-1])
    yield ("a training step, ResNet-50", ours.get("ratio"), "", "")
    for case in e2e.cases(e2e.E2eArgs()):
        row = trained(results, case, OURS)
        yield (f"from files to weights: {called(case)}", *(row.get(name) for name in e2e.BASES))
    loop = results.find("dropin", implementation=list(dropin.VARIANTS)[-1])
    yield ("lightly's own loop with three lines changed", "", "", loop.get("ratio"))
