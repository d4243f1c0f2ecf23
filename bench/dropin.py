"""lightly's MoCo loop as it is, with our operations under its names, with our loading and our arithmetic: pairs/s."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.command import start
from bench.example import LOADING, OURS, PARTS, Example, Laps, lightlys
from bench.loaders import endless
from bench.step import FLOAT32_TOLERANCE, LOSS_TOLERANCE, PLAIN, Variant, as_run
from bench.timing import environment, save
from fastmoco.adapters.loader import PairLoader
from fastmoco.data.loader import default_workers
from fastmoco.errors import UserError
from fastmoco.train.config import Arch


@dataclass(frozen=True)
class Change:
    """Which lines of lightly's loop are ours: the imports of its operations, its loader, its backbone."""

    operations: bool = False
    loading: bool = False
    arithmetic: bool = False

    @property
    def variant(self) -> Variant:
        """The arithmetic of the backbone."""
        return as_run("cpu") if self.arithmetic else PLAIN

    def workers(self, theirs: int) -> int:
        """What loads: `theirs`, processes of lightly's loader, or as many threads as ours has that is not told."""
        return default_workers("cpu") if self.loading else theirs


LIGHTLY, ALL = "lightly", "our operations, loading and arithmetic"
# Each has the changes of those before it.
VARIANTS = {
    LIGHTLY: Change(),
    "our operations": Change(operations=True),
    "our operations and loading": Change(operations=True, loading=True),
    ALL: Change(operations=True, loading=True, arithmetic=True),
}
# Times as fast as lightly's loop that is asked for of all changes together.
TARGET = 2.0
# At the start of a turn, as caches are others'; of what was loaded ahead during their turns, two batches a worker with
# torch's loader, they use up a part.
UNTIMED = 2
COLUMNS = ["implementation", "precision", "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s"]
COLUMNS += ["ratio", "ratio_low", "ratio_high", "gain", "step", *PARTS, "loss_error"]
BANK, TEMPERATURE, MOMENTUM, LR = 4096, 0.1, 0.99, 0.06


@dataclass(kw_only=True)
class LoopArgs:
    """What the loop trains, and on what."""

    data: Path
    """Folder of images."""
    arch: Arch = "resnet50"
    """Torchvision ResNet."""
    size: int = 64
    """Side of the views, in pixels."""
    batch_size: int = 32
    """Images in a batch."""
    workers: int = 2
    """Processes that load, of lightly's loader."""


@dataclass(kw_only=True)
class DropInArgs(LoopArgs):
    """Train by turns with lightly's parts and with ours, on the same images."""

    steps: int = 6
    """Timed steps in a turn."""
    turns: int = 4
    """Turns of each."""
    out: Path | None = None
    """Markdown file to write; a JSON file of the same name is put beside it."""


class Loop:
    """A training that goes on a few steps at a time: its losses, seconds of each turn, and of each part of them.

    `seed` decides weights, negatives, order and views. `normalize`: whether lightly's transforms end with ImageNet's
    mean and deviation, as they do by default; ours leave values in [0, 1]. Raises UserError without a folder of images.
    """

    def __init__(self, args: LoopArgs, change: Change, *, seed: int = 0, normalize: bool = True) -> None:
        if not args.data.is_dir():
            raise UserError(f"--data {args.data}: no such folder; name one with images")
        # lightly's transforms draw from all three.
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.example = Example(
            args.arch,
            OURS if change.operations else lightlys(),
            bank=BANK,
            temperature=TEMPERATURE,
            momentum=MOMENTUM,
            lr=LR,
            accelerated=change.arithmetic,
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.laps = Laps()
        self._batches = _endless(_our_loader(args, seed) if change.loading else _lightly_loader(args, normalize))

    def steps(self, count: int, laps: Laps | None = None) -> None:
        """Do `count` steps."""
        laps = laps or Laps()
        for _ in range(count):
            laps.start()
            (x0, x1), _, _ = next(self._batches)
            laps.end(LOADING)
            self.losses.append(float(self.example.step(x0, x1, laps)))

    def turn(self, count: int) -> None:
        """Do UNTIMED steps, and `count` that are timed."""
        self.steps(UNTIMED)
        start = time.perf_counter()
        self.steps(count, self.laps)
        self.seconds.append(time.perf_counter() - start)


def _lightly_loader(args: LoopArgs, normalize: bool) -> Any:
    """lightly's dataset and MoCo v2 transforms, in torch's loader: as its example has them, but that no epoch ends."""
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    transform = MoCoV2Transform(input_size=args.size, normalize=IMAGENET_NORMALIZE if normalize else None)
    dataset = LightlyDataset(str(args.data), transform=transform)
    return endless(dataset, args.batch_size, args.workers)


def _our_loader(args: LoopArgs, seed: int) -> PairLoader:
    return PairLoader(args.data, recipe="mocov2", size=args.size, batch_size=args.batch_size, seed=seed)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def first_losses(loops: dict[str, Loop], args: LoopArgs) -> dict[str, float]:
    """The relative difference of each loop's loss of the same random views from lightly's; said, with the limit."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.rand(2, args.batch_size, 3, args.size, args.size, generator=generator)
    losses = {name: float(loop.example.backward(x0, x1)) for name, loop in loops.items()}
    errors = {name: abs(loss - losses[LIGHTLY]) / abs(losses[LIGHTLY]) for name, loss in losses.items()}
    for name, error in errors.items():
        limit = VARIANTS[name].variant.tolerance
        verdict = "" if error <= limit else ": PARITY FAILS, no speed is shown"
        print(f"first loss, {name}: {losses[name]:.6f}, off by {error:.1e} (limit {limit:g}){verdict}")
    return errors


def described(loop: Loop, base: Loop, args: DropInArgs) -> dict[str, Any]:
    """Pairs a second, times as fast as `base` in turns of the same round, and milliseconds and share of each part of a
    step."""
    slow, speed, fast = np.percentile([args.steps * args.batch_size / spent for spent in loop.seconds], (20, 50, 80))
    ratios = [theirs / own for theirs, own in zip(base.seconds, loop.seconds, strict=True)]
    count, whole = args.steps * args.turns, sum(loop.seconds)
    parts = {part: {"ms": 1e3 * spent / count, "share": spent / whole} for part, spent in loop.laps.seconds.items()}
    return {
        "pairs_per_s": float(speed),
        "slow_pairs_per_s": float(slow),
        "fast_pairs_per_s": float(fast),
        "ratio": float(np.median(ratios)),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "step": f"{1e3 * whole / count:.0f} ms",
        **{part: f"{of['ms']:.0f} ms, {of['share']:.0%}" for part, of in parts.items()},
        "parts": parts,
        "losses": loop.losses,
    }


def main(args: DropInArgs) -> int:
    """Train by turns, print and write the table; status 1 where a first loss disagrees."""
    loops = {name: Loop(args, change) for name, change in VARIANTS.items()}
    errors = first_losses(loops, args)
    for name in [name for name, error in errors.items() if not error <= VARIANTS[name].variant.tolerance]:
        del loops[name]
    for _ in range(args.turns):
        for loop in loops.values():
            loop.turn(args.steps)
    rows: list[dict[str, Any]] = []
    for name, error in errors.items():
        row: dict[str, Any] = {"op": "dropin", "implementation": name, "arch": args.arch, "size": args.size}
        row |= {"batch": args.batch_size, "workers": VARIANTS[name].workers(args.workers), "turns": args.turns}
        row |= {"loss_error": error}
        row |= {"precision": str(VARIANTS[name].variant)}
        rows.append(row | (described(loops[name], loops[LIGHTLY], args) if name in loops else {}) | environment())
    before = 1.0
    for row in (row for row in rows if "pairs_per_s" in row):
        row["gain"], before = row["ratio"] / before, row["ratio"]
        print(f"{row['implementation']}: {row['pairs_per_s']:.1f} pairs/s, {row['ratio']:.2f} times lightly's")
        print(f"  a step {row['step']}: " + "; ".join(f"{part} {row[part]}" for part in PARTS))
    verdict = judged(rows[-1].get("ratio"))
    print(verdict)
    if args.out is not None:
        write(rows, args, args.out, verdict)
    return 1 if any("pairs_per_s" not in row for row in rows) else 0


def write(rows: list[dict[str, Any]], args: DropInArgs, out: Path, verdict: str) -> None:
    """Write the table to `out`, and say so."""
    save(
        rows,
        out,
        title=f"lightly's MoCo loop, {args.arch}, {args.size} px, batches of {args.batch_size}",
        command=command("dropin", args),
        columns=COLUMNS,
        note=f"{verdict}\n\n"
        f"By turns of {UNTIMED} untimed and {args.steps} timed steps; slow and fast are the 20th and the "
        f"80th percentile of {args.turns}. precision: of the backbones; lightly's example is float32, ours bfloat16 "
        "where the processor has it. ratio: times as fast as lightly in the turn of the same round, the median, the "
        "lowest and the highest; gain: the ratio over that of the row above, which is one change less. A step and its "
        "parts: milliseconds, and share of the step. loading is the time spent waiting for images: what loads "
        "meanwhile takes processor time from the other parts, and goes on for a few batches while others have their "
        "turn. Our loader starts each epoch anew, lightly's has no end. loss_error: relative difference of the first "
        "loss of the same views from lightly's "
        f"(limit {FLOAT32_TOLERANCE:g} in float32, {LOSS_TOLERANCE:g} in bfloat16).",
    )
    print(f"written: {out} and {out.with_suffix('.json')}")


def command(module: str, args: LoopArgs) -> str:
    """What was run, with every option that it had but the names of the user's folders."""
    options = {name.replace("_", "-"): value for name, value in vars(args).items() if name not in ("data", "out")}
    return " ".join([f"python -m bench.{module} --data IMAGES", *(f"--{name} {options[name]}" for name in options)])


def judged(ratio: float | None) -> str:
    """Whether all changes together are as fast as is asked for."""
    asked = f"Asked for with all changes: {TARGET:g} times as fast as lightly: "
    return asked + ("not timed." if ratio is None else f"{'met' if ratio >= TARGET else 'NOT MET'}, {ratio:.2f} times.")


if __name__ == "__main__":
    start(main, DropInArgs, "dropin")
