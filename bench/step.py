"""How much faster is the bf16 channels-last training step than the same step in fp32, NCHW?

Prints the agreement of the first losses before any speed, and no speed where they disagree.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench.timing import environment, interleaved, quantiles, save
from fastmoco.data.loader import Batch
from fastmoco.precision import cpu_has_bf16
from fastmoco.train.config import Config
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer

# The tolerance that the parity tests hold bfloat16 to.
LOSS_TOLERANCE = 2e-2
VARIANTS: dict[str, tuple[Literal["bf16", "fp32"], bool]] = {
    "fp32 NCHW": ("fp32", False),
    "fp32 channels-last": ("fp32", True),
    "bf16 channels-last": ("bf16", True),
}


@dataclass(kw_only=True)
class StepArgs:
    """Time whole training steps (both forwards, backward, SGD, EMA, queue) on random images."""

    recipe: str = "histology-mse"
    """Recipe whose method, head and constants are used."""
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Encoder."""
    size: int = 128
    """Side of the images, pixels."""
    batch_size: int = 16
    """Images a step."""
    rounds: int = 12
    """Timed steps of each variant."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


def build(args: StepArgs, precision: Literal["bf16", "fp32"], channels_last: bool) -> Trainer:
    """A trainer for one variant; all variants start from the same weights."""
    config: Config = find(args.recipe)(Path(), Path())
    config = replace(
        config,
        views=replace(config.views, size=args.size),
        model=replace(config.model, arch=args.arch),
        optim=replace(config.optim, batch_size=args.batch_size),
        run=replace(config.run, precision=precision, channels_last=channels_last, log_every=10**4),
    )
    return Trainer(config, precision=precision, device=torch.device(args.device))


def views(args: StepArgs, channels_last: bool) -> Batch:
    """The same random views for every variant, as a loader for that variant would lay them out."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.size, args.size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    q, k = (torch.rand(shape, generator=generator).half().contiguous(memory_format=layout) for _ in range(2))
    return Batch(q, k, np.arange(args.batch_size))


def main(args: StepArgs) -> int:
    """Run the benchmark; status 1 where parity fails."""
    console = Console()
    if args.device == "cpu" and not cpu_has_bf16():
        console.print("this processor has no bfloat16 instructions: expect bf16 to be slower than fp32 here")
    trainers = {name: build(args, *variant) for name, variant in VARIANTS.items()}
    batches = {name: views(args, layout) for name, (_, layout) in VARIANTS.items()}
    first: dict[str, float] = {}
    for name, trainer in trainers.items():
        trainer.step([batches[name]], lr=0.0)
        first[name] = trainer.history.read()[0]["loss"]
    expected = first["fp32 NCHW"]
    errors = {name: abs(loss - expected) / abs(expected) for name, loss in first.items()}
    for name, error in errors.items():
        console.print(f"first loss, {name}: {first[name]:.6f}, off by {error:.1e} (tolerance {LOSS_TOLERANCE:g})")
    if not max(errors.values()) <= LOSS_TOLERANCE:
        console.print("the losses disagree, so no speed is shown")
        return 1

    def stepper(name: str) -> Any:
        def step() -> None:
            trainers[name].step([batches[name]], lr=1e-4)
            trainers[name].history.read()

        return step

    seconds = interleaved({name: stepper(name) for name in VARIANTS}, rounds=args.rounds)
    base = float(np.median(seconds["fp32 NCHW"]))
    table = Table(title=f"{args.arch}, {args.size} px, batch {args.batch_size}, {args.recipe}: one training step")
    for heading in ("variant", "p20 ms", "p50 ms", "p80 ms", "pairs/s", "against fp32 NCHW"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    rows: list[dict[str, Any]] = []
    for name, samples in seconds.items():
        spread = quantiles(samples)
        pairs = args.batch_size / float(np.median(samples))
        ratio = base / float(np.median(samples))
        table.add_row(name, *(f"{value:.0f}" for value in spread.values()), f"{pairs:.1f}", f"{ratio:.2f}x")
        rows.append(
            {"op": "step", "implementation": name, "arch": args.arch, "size": args.size, "batch": args.batch_size}
            | spread
            | {"pairs_per_s": pairs, "ratio": ratio, "loss_error": errors[name], "device": args.device}
            | environment()
        )
    console.print(table)
    if args.out is not None:
        save(
            rows,
            args.out,
            title=f"One training step: {args.arch}, {args.size} px, batch {args.batch_size}, {args.recipe}",
            command=f"python -m bench.step --recipe {args.recipe} --arch {args.arch} --size {args.size} "
            f"--batch-size {args.batch_size} --rounds {args.rounds}",
            columns=["implementation", "p20_ms", "p50_ms", "p80_ms", "pairs_per_s", "ratio", "loss_error"],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(StepArgs, prog="python -m bench.step")))
