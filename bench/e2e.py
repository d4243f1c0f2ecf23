"""From files to updated weights: how much faster does a run go than lightly's example, and than an eager reference?

The eager reference is the paper's step, plainly written, fed by torchvision's PIL pipeline, as it is used and with
denormals rounded to zero. All have the same images, views, weights, negatives and method. Each runs in a process of its
own and takes turns with the others, loader and training at work at once as in a run. The agreement of the first losses,
on the same views, is printed before any speed.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.command import start
from bench.loaders import Setting, read_generated, read_manifest
from bench.photographs import COUNT, SIDE, draw_photographs
from bench.plot import save_speeds
from bench.products import Products
from bench.step import FLOAT32_TOLERANCE, LOSS_TOLERANCE, StepArgs
from bench.timing import environment, save
from bench.turns import Contestant, Missing, Turn, as_rows, rounds, summary
from bench.ways import EAGER, FLUSHED, LIGHTLY, OURS, WAYS, Training, workers_of
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.train.recipes import find

PRELOAD = ("torch", "torchvision.transforms.v2", "bench.loaders", "bench.step", "bench.ways", "bench.plot", "tyro")
# Losses that are compared: the second's negatives have the first's keys among them.
LOSSES = 2
# Times as fast as lightly's example that is asked for; of the eager reference, as it is used, each case says.
TO_LIGHTLY = 2.0
# What each ratio is to.
BASES = {"ratio": EAGER, "ratio_flushed": FLUSHED, "ratio_lightly": LIGHTLY}
OF_EAGER = ("ratio", "ratio_low", "ratio_high")
# No way from files to weights, but what takes turns with them.
LIMIT = "products alone"
# Of what is printed: a table with every column and the longest verdict.
WIDTH = 150
COLUMNS = ["images", "implementation", "precision", "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s"]
COLUMNS += ["cpu_ms_per_pair", "peak_mb", "waiting"]
COLUMNS += [f"{name}{which}" for name in BASES for which in ("", "_low", "_high")]
COLUMNS += ["limit", "limit_low", "limit_high", "target", "met", "loss_error"]
NOTE = (
    "Medians of turns that alternate; slow and fast are their 20th and 80th percentile. precision: fastmoco trains "
    "channels-last and in bfloat16 where the processor has it, the others in float32, as the paper's code and "
    "lightly's example do. cpu_ms_per_pair and peak_mb are those of a process and all that it started. waiting: share "
    "of the time spent waiting for images. ratio, ratio_flushed, ratio_lightly: times as fast as the eager reference "
    "as it is used, as the same with denormals flushed, and as lightly's example, in turns that stand side by side: "
    "their median, the lowest and the highest. The blur of torchvision multiplies by denormal weights, which some "
    "processors do a hundred times as slowly; the targets are to the eager reference as it is used. lightly's example "
    "has plain SGD, without momentum and weight decay. limit: as ratio, of as many multiplications as the step's "
    "convolutions and linear layers have, in fastmoco's precision, by the fastest of large products and convolutions "
    "here, and nothing else (--limit): what multiplies as often is hardly faster. loss_error: the greatest relative "
    "difference of the first losses from the eager reference's, given the same views, weights and negatives "
    f"(limit {FLOAT32_TOLERANCE:g} in float32, {LOSS_TOLERANCE:g} in bfloat16)."
)


Arch = Literal["resnet18", "resnet50"]


@dataclass(frozen=True)
class Case:
    """An encoder, the side of the views in pixels and the pairs in a batch."""

    arch: Arch
    size: int
    batch_size: int

    @property
    def to_eager(self) -> float:
        """Times as fast as the eager reference that is asked for: less where convolutions are nearly all there is."""
        return 2.5 if self.arch == "resnet50" and self.size >= 224 else 3.0


@dataclass(kw_only=True)
class E2eArgs:
    """Train on files for some seconds in each way: pairs a second, processor time and memory."""

    data: Path | None = None
    """Folder of images; without it, generated JPEGs of 512 pixels."""
    generated: Path | None = None
    """Folder with these, where they have been drawn before."""
    recipe: str = "mocov2"
    """Recipe whose method, head and constants are used; the views are MoCo v2's. lightly's example is left out where
    the method has stage losses."""
    archs: tuple[Arch, ...] = ("resnet18", "resnet50")
    """Encoders."""
    sizes: tuple[int, ...] = (64, 224)
    """Sides of the views in pixels; batches have 32 pairs below 128 pixels, 16 from there on."""
    queue_size: int = 4096
    """Keys in the queue, of all; 4,096 are those of lightly's example."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, or processes in loaders that use processes; fastmoco has as many threads as a run that is not told."""
    seconds: float = 4.0
    """Length of a turn, in seconds, at least some whole steps; a quarter as long goes before it untimed."""
    rounds: int = 3
    """Turns of each way."""
    limit: bool = False
    """Also time the multiplications of a step alone, on a CPU: how much faster than the eager reference it could be."""
    quick: bool = False
    """One small case and short turns: a check that all of it runs, not a measurement."""
    device: str = "cpu"
    """Device to train on."""
    out: Path | None = None
    """Markdown file to write; the rows are put beside it as JSON, and a plot."""


def measure(case: Case, setting: Setting, name: str, args: E2eArgs, console: Console) -> list[dict[str, Any]]:
    """Rows for one case; none of a way whose first losses disagree has a speed."""
    step = StepArgs(
        recipe=args.recipe,
        arch=case.arch,
        size=case.size,
        batch_size=case.batch_size,
        queue_size=args.queue_size,
        device=args.device,
    )
    with ExitStack() as stack:
        ways: dict[str, Contestant] = {}
        for way in WAYS:
            try:
                ways[way] = stack.enter_context(Contestant(Training, way, step, setting, preload=PRELOAD))
            except Missing as reason:
                console.print(f"  {way}: left out, {reason}")
        variants = {way: WAYS[way].variant(args.device) for way in ways}
        losses = {way: there.ask("first_losses", LOSSES) for way, there in ways.items()}
        limits = {way: variant.tolerance for way, variant in variants.items()}
        errors = disagreements(losses, limits, console.print)
        for way in [way for way, error in errors.items() if not error <= limits[way]]:
            ways.pop(way).close()
        if args.limit:
            ways[LIMIT] = stack.enter_context(Contestant(Products, step, preload=PRELOAD))
        turns = rounds(ways, "turn", args.seconds, count=args.rounds)
    rows: list[dict[str, Any]] = []
    for way, error in errors.items():
        row: dict[str, Any] = {"op": "e2e", "implementation": way, "images": name, "loader": WAYS[way].loader}
        row |= {"recipe": args.recipe, "arch": case.arch, "size": case.size, "batch": case.batch_size}
        row |= {"K": args.queue_size, "workers": workers_of(way, args.workers, args.device)}
        row |= {"precision": str(variants[way]), "loss_error": error}
        if way in turns:
            row |= summary(turns[way]) | ratios(turns, way) | {"every_turn": as_rows(turns[way])}
            if way == OURS:
                row |= judged(row, case) | limits_of(turns)
        rows.append(row | environment(args.device))
    return rows


def disagreements(
    losses: Mapping[str, list[float]], limits: Mapping[str, float], say: Callable[[str], None]
) -> dict[str, float]:
    """How far the first losses are from the eager reference's, relative, at most; said, with the limit."""
    errors: dict[str, float] = {}
    for way, own in losses.items():
        apart = [abs(loss - eager) / abs(eager) for loss, eager in zip(own, losses[EAGER], strict=True)]
        # `max` passes over a NaN that does not stand first.
        errors[way] = max(apart) if all(map(math.isfinite, apart)) else math.inf
        verdict = "" if errors[way] <= limits[way] else ": PARITY FAILS, no speed is shown"
        shown = ", ".join(f"{loss:.6f}" for loss in own)
        say(f"  first losses, {way}: {shown}, off by {errors[way]:.1e} (limit {limits[way]:g}){verdict}")
    return errors


def ratios(turns: Mapping[str, Sequence[Turn]], way: str) -> dict[str, float | None]:
    """How many times as fast as each of `BASES` `way` is, in turns of the same round: their median, the lowest and the
    highest; None of what was not timed."""
    speeds = {name: np.array([turn.pairs / turn.seconds for turn in taken]) for name, taken in turns.items()}
    found: dict[str, float | None] = {}
    for name, base in BASES.items():
        each = speeds[way] / speeds[base] if base in speeds else None
        for which, take in (("", np.median), ("_low", np.min), ("_high", np.max)):
            found[name + which] = None if each is None else float(take(each))
    return found


def limits_of(turns: Mapping[str, Sequence[Turn]]) -> dict[str, float | None]:
    """`ratio` of the multiplications alone, by its own name; nothing where they were not timed."""
    if LIMIT not in turns:
        return {}
    return {name.replace("ratio", "limit"): value for name, value in ratios(turns, LIMIT).items() if name in OF_EAGER}


def judged(row: Mapping[str, Any], case: Case) -> dict[str, str]:
    """What is asked of our row, beside what was timed, and whether it is met: yes, or no and beside which not."""
    asked = {"ratio": (case.to_eager, "eager"), "ratio_lightly": (TO_LIGHTLY, "lightly")}
    timed = {name: goal for name, goal in asked.items() if row[name] is not None}
    short = [of for name, (goal, of) in timed.items() if row[name] < goal]
    return {
        "target": ", ".join(f"{goal:g}x {of}" for goal, of in timed.values()),
        "met": f"no: {', '.join(short)}" if short else "yes",
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table for each case."""
    headings = ["files to weights", "pairs/s", "20-80 %", "CPU ms", "MB", "to eager", "flushed", "to lightly"]
    limited = any(row.get("limit") is not None for row in rows)
    headings += [*(["limit"] if limited else []), "met"]
    for images in dict.fromkeys(row["images"] for row in rows):
        table = Table(title=images)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
        for row in (row for row in rows if row["images"] == images):
            if "pairs_per_s" not in row:
                table.add_row(row["implementation"], *("-" for _ in headings[1:]))
                continue
            table.add_row(
                row["implementation"],
                f"{row['pairs_per_s']:.1f}",
                f"{row['slow_pairs_per_s']:.1f}-{row['fast_pairs_per_s']:.1f}",
                f"{row['cpu_ms_per_pair']:.1f}",
                f"{row['peak_mb']:.0f}",
                *("-" if row[name] is None else f"{row[name]:.2f}x" for name in BASES),
                *(["" if row.get("limit") is None else f"{row['limit']:.2f}x"] if limited else []),
                row.get("met", ""),
            )
        console.print(table)


def shown(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of the file; those of the limit only where it was timed."""
    limited = any(row.get("limit") is not None for row in rows)
    return [name for name in COLUMNS if limited or not name.startswith("limit")]


def cases(args: E2eArgs) -> list[Case]:
    """What is measured, the smaller views first."""
    if args.quick:
        return [Case("resnet18", 32, 4)]
    return [Case(arch, size, 32 if size < 128 else 16) for size in args.sizes for arch in args.archs]


def main(args: E2eArgs) -> int:
    """Run the benchmark; status 1 where a first loss disagrees."""
    console = Console(width=WIDTH, highlight=False)
    if args.limit and args.device.startswith("cuda"):
        raise UserError(f"--limit is of CPUs: on {args.device} the launches of products take the time; leave it out")
    find_device(args.device)
    if args.generated is not None and (args.quick or args.data is not None):
        other = "--quick draws smaller ones" if args.quick else "--data has its own"
        raise UserError(f"--generated: {other}; leave one of both out")
    if args.quick:
        args = replace(args, seconds=0.1, rounds=2)
    views = find("mocov2")(Path(), Path()).views
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # What is found out about the files is of no use to anybody later.
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        if args.generated is not None:
            manifest = read_generated(args.generated)
        else:
            source = args.data or Path(folder, "images")
            if args.data is None:
                side, count = (128, 16) if args.quick else (SIDE, COUNT)
                draw_photographs(source, count, side)
            manifest = read_manifest(source)
        height, width = np.median(manifest.sizes, axis=0).astype(int)
        kind = "generated JPEGs" if args.data is None else "images"
        for case in cases(args):
            name = f"{case.arch}, {case.size} px, batch {case.batch_size}, "
            name += f"from {len(manifest)} {kind} of {height} x {width} px"
            console.print(f"{name}, {args.recipe}")
            setting = Setting(manifest, replace(views, size=case.size), case.batch_size, args.workers, args.device)
            rows += measure(case, setting, name, args, console)
    show(rows, console)
    if args.out is not None:
        command = f"python -m bench.e2e --recipe {args.recipe} --queue-size {args.queue_size} --workers {args.workers}"
        save(
            rows,
            args.out,
            title=f"From files to updated weights, {args.recipe}",
            command=f"{command} --device {args.device} --seconds {args.seconds} --rounds {args.rounds}"
            + f" --archs {' '.join(args.archs)} --sizes {' '.join(map(str, args.sizes))}"
            + (" --data IMAGES" if args.data else "")
            + (" --limit" if args.limit else ""),
            columns=shown(rows),
            note=NOTE,
        )
        console.print(save_speeds(rows, args.out.with_suffix(".png"), title="Pairs a second, from files to weights"))
    return 1 if any("pairs_per_s" not in row for row in rows) else 0


if __name__ == "__main__":
    start(main, E2eArgs, "e2e")
