"""From files to updated weights: how much faster does a run go than the paper's step fed by torchvision's PIL pipeline?

Each way runs in a process of its own and takes turns with the others, loader and training at work at once as in a run.
The agreement of the first losses, on the same views, is printed before any speed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.loaders import LOADERS, Pair, Setting, fastmoco_loader
from bench.photographs import draw_photographs
from bench.plot import save_speeds
from bench.step import LOSS_TOLERANCE, StepArgs, Variant, build, build_paper
from bench.timing import environment, save
from bench.turns import Contestant, Turn, as_rows, rounds, summary, take_turn
from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import Batch
from fastmoco.data.manifest import load_manifest
from fastmoco.precision import cpu_has_bf16
from fastmoco.train.recipes import find

# A step that changes the weights, and so little that none of the ways runs into other numbers than another.
LR = 1e-4
PAPER = "paper's step, torchvision PIL"
# The step and the loader of each way.
WAYS: dict[str, tuple[Literal["paper", "ours"], str]] = {
    PAPER: ("paper", "torchvision, PIL"),
    "fastmoco's step, torchvision PIL": ("ours", "torchvision, PIL"),
    "fastmoco": ("ours", "fastmoco dali" if dali_installed() else "fastmoco pillow"),
}
PRELOAD = ("torch", "torchvision.transforms.v2", "bench.loaders", "bench.step")
COLUMNS = ["images", "implementation", "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s", "ratio", "waiting"]
COLUMNS += ["cpu_ms_per_pair", "memory_mb", "loss_error"]


@dataclass(frozen=True)
class Case:
    """An encoder, the side of the views in pixels and the pairs in a batch."""

    arch: Literal["resnet18", "resnet50"]
    size: int
    batch_size: int


CASES = (Case("resnet18", 64, 32), Case("resnet50", 128, 16))
QUICK = (Case("resnet18", 32, 4),)


@dataclass(kw_only=True)
class E2eArgs:
    """Train on files for some seconds in each way: pairs a second, share of the time spent waiting, processor time."""

    recipe: str = "histology-barlow"
    """Recipe whose method, head and constants are used; the views are MoCo v2's."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads, or processes in loaders that use processes."""
    seconds: float = 2.0
    """Length of a turn."""
    rounds: int = 3
    """Turns of each way."""
    quick: bool = False
    """One small case and short turns: a check that all of it runs, not a measurement."""
    device: str = "cpu"
    """Device to train on."""
    out: Path | None = None
    """Markdown file to write; the rows are put beside it as JSON, and a plot."""


class Training:
    """A step fed by a loader, at work in its own process."""

    def __init__(self, way: str, recipe: str, case: Case, setting: Setting) -> None:
        step, loader = WAYS[way]
        self._setting, self._open = setting, LOADERS[loader]
        # The draws of torchvision's transforms.
        torch.manual_seed(0)
        args = StepArgs(
            recipe=recipe, arch=case.arch, size=case.size, batch_size=case.batch_size, device=setting.device
        )
        self.backward, self.step = (_papers if step == "paper" else _ours)(args)

    def first_loss(self) -> float:
        """The loss of the first of fastmoco's views by the weights that every way starts from, before any step."""
        with fastmoco_loader("pillow")(self._setting) as items:
            return self.backward(next(items))

    def turn(self, seconds: float) -> Turn:
        """One turn of about `seconds`."""

        def use(pair: Pair) -> int:
            self.step(pair)
            return len(pair[0])

        finish = torch.cuda.synchronize if self._setting.device != "cpu" else lambda: None
        burst = max(self._setting.workers, 1)
        return take_turn(self._open(self._setting), use, seconds=seconds, burst=burst, finish=finish)


Steps = tuple[Callable[[Pair], float], Callable[[Pair], object]]


def _papers(args: StepArgs) -> Steps:
    """The paper's: eager, float32, NCHW, torch's SGD."""
    trainer = build(args, Variant("fp32", channels_last=False))
    paper, optim = build_paper(trainer), trainer.config.optim
    parameters = [p for module in (paper.query, *paper.projectors) for p in module.parameters()]
    sgd = torch.optim.SGD(parameters, lr=LR, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay)

    def backward(pair: Pair) -> float:
        q, k = (view.to(args.device, torch.float32).contiguous() for view in pair)
        return paper.backward(q, k)["total"].item()

    def step(pair: Pair) -> None:
        backward(pair)
        sgd.step()

    return backward, step


def _ours(args: StepArgs) -> Steps:
    """fastmoco's as a run has it: channels-last, in bfloat16 where the device multiplies it."""
    fast = args.device != "cpu" or cpu_has_bf16()
    trainer = build(args, Variant("bf16" if fast else "fp32", channels_last=True))

    def advance(pair: Pair, lr: float) -> float:
        q, k = (view.contiguous(memory_format=torch.channels_last) for view in pair)
        trainer.step([Batch(q, k, torch.arange(len(q)).numpy())], lr=lr)
        return trainer.history.read()[0]["loss"]

    return lambda pair: advance(pair, 0.0), lambda pair: advance(pair, LR)


def measure(case: Case, setting: Setting, name: str, args: E2eArgs, console: Console) -> list[dict[str, Any]]:
    """Rows for one case; none of a way whose first loss disagrees has a speed."""
    with ExitStack() as stack:
        ways = {
            way: stack.enter_context(Contestant(Training, way, args.recipe, case, setting, preload=PRELOAD))
            for way in WAYS
        }
        errors = disagreements({way: contestant.ask("first_loss") for way, contestant in ways.items()}, console.print)
        for way in [way for way, error in errors.items() if not error <= LOSS_TOLERANCE]:
            ways.pop(way).close()
        turns = rounds(ways, "turn", args.seconds, count=args.rounds)
    base = summary(turns[PAPER])["pairs_per_s"]
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        row: dict[str, Any] = {"op": "e2e", "implementation": way, "images": name, "loader": WAYS[way][1]}
        row |= {"arch": case.arch, "size": case.size, "batch": case.batch_size, "workers": args.workers}
        row["loss_error"] = errors[way]
        if way in turns:
            figures = summary(turns[way])
            row |= figures | {"ratio": figures["pairs_per_s"] / base, "every_turn": as_rows(turns[way])}
        rows.append(row | environment(args.device))
    return rows


def disagreements(losses: dict[str, float], say: Callable[[str], None]) -> dict[str, float]:
    """How far each first loss is from the paper's, relative; said, with the limit."""
    errors = {way: abs(loss - losses[PAPER]) / abs(losses[PAPER]) for way, loss in losses.items()}
    for way, error in errors.items():
        verdict = "" if error <= LOSS_TOLERANCE else ": PARITY FAILS, no speed is shown"
        say(f"  first loss, {way}: {losses[way]:.6f}, off by {error:.1e} (limit {LOSS_TOLERANCE:g}){verdict}")
    return errors


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table for each case."""
    for images in dict.fromkeys(row["images"] for row in rows):
        table = Table(title=images)
        headings = ("from files to weights", "pairs/s", "20-80 %", "to the paper", "waiting", "CPU ms", "MB")
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
                f"{row['ratio']:.2f}x",
                f"{row['waiting']:.0%}",
                f"{row['cpu_ms_per_pair']:.1f}",
                f"{row['memory_mb']:.0f}",
            )
        console.print(table)


def main(args: E2eArgs) -> int:
    """Run the benchmark; status 1 where a first loss disagrees."""
    console = Console(width=120, highlight=False)
    if args.quick:
        args = replace(args, seconds=0.1, rounds=2)
    views = find("mocov2")(Path(), Path()).views
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # What is found out about the generated files is of no use to anybody later.
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        side, count = (128, 16) if args.quick else (512, 192)
        draw_photographs(Path(folder, "images"), count, side)
        manifest = load_manifest(
            Path(folder, "images"), decoder="dali" if dali_installed() else "pillow", progress=False
        )
        for case in QUICK if args.quick else CASES:
            name = f"{case.arch}, {case.size} px, batch {case.batch_size}, from JPEGs of {side} px"
            console.print(f"{name}, {args.recipe}")
            setting = Setting(manifest, replace(views, size=case.size), case.batch_size, args.workers, args.device)
            rows += measure(case, setting, name, args, console)
    show(rows, console)
    if args.out is not None:
        command = f"python -m bench.e2e --recipe {args.recipe} --workers {args.workers} --device {args.device}"
        save(
            rows,
            args.out,
            title=f"From files to updated weights, {args.recipe}",
            command=f"{command} --seconds {args.seconds} --rounds {args.rounds}",
            columns=COLUMNS,
        )
        console.print(save_speeds(rows, args.out.with_suffix(".png"), title="Pairs a second, from files to weights"))
    return 1 if any("pairs_per_s" not in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(E2eArgs, prog="python -m bench.e2e")))
