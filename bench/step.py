"""How much faster is a training step than the paper's, and which part of that is precision and memory layout?

The paper's step is `bench.paper` in eager fp32 NCHW, with torch's SGD as its code has it. Prints the agreement of the
first losses before any speed, and no speed where they disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.command import start
from bench.paper import Paper, StageLoss
from bench.timing import environment, interleaved, quantiles, save
from fastmoco.data.loader import Batch
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.losses import StageBarlow
from fastmoco.precision import cpu_has_bf16, default_precision
from fastmoco.train.config import Config
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer

PAPER = "paper, fp32 NCHW"
# Of a first loss, relative. The tolerance that the parity tests hold bfloat16 to; and that of float32.
LOSS_TOLERANCE, FLOAT32_TOLERANCE = 2e-2, 1e-4


@dataclass(frozen=True)
class Variant:
    """How a step runs."""

    precision: Literal["bf16", "fp32"]
    channels_last: bool
    cuda_graph: bool = False

    @property
    def tolerance(self) -> float:
        """How far its first loss may be from that of others with the same weights and views, relative."""
        return LOSS_TOLERANCE if self.precision == "bf16" else FLOAT32_TOLERANCE

    def __str__(self) -> str:
        """As the `precision` of a row."""
        return f"{self.precision} {'channels-last' if self.channels_last else 'NCHW'}"


# The paper's code, and lightly's example.
PLAIN = Variant("fp32", channels_last=False)


def as_run(device: str) -> Variant:
    """As a run of fastmoco has it: channels-last, in bfloat16 where the device multiplies it."""
    return Variant(default_precision(torch.device(device).type), channels_last=True)


VARIANTS = {
    "fp32 NCHW": Variant("fp32", False),
    "fp32 channels-last": Variant("fp32", True),
    "bf16 channels-last": Variant("bf16", True),
}
ON_CUDA = {"bf16 channels-last, CUDA graph": Variant("bf16", True, cuda_graph=True)}


@dataclass(kw_only=True)
class StepArgs:
    """Time whole training steps (both forwards, backward, SGD, EMA, queue) on random images."""

    recipe: str = "histology-barlow"
    """Recipe whose method, head and constants are used."""
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """Encoder."""
    size: int = 64
    """Side of the images, pixels."""
    batch_size: int = 32
    """Images a step."""
    queue_size: int | None = None
    """Keys in the queue; None: as the recipe has it."""
    rounds: int = 12
    """Timed steps of each variant."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


def build(args: StepArgs, variant: Variant) -> Trainer:
    """A trainer for one variant; all variants start from the same weights."""
    precision = variant.precision
    config: Config = find(args.recipe)(Path(), Path())
    config = replace(
        config,
        views=replace(config.views, size=args.size),
        model=replace(config.model, arch=args.arch),
        optim=replace(config.optim, batch_size=args.batch_size),
        loss=replace(config.loss, queue_size=args.queue_size or config.loss.queue_size),
        run=replace(
            config.run,
            precision=precision,
            channels_last=variant.channels_last,
            cuda_graph=variant.cuda_graph,
            log_every=10**4,
        ),
    )
    return Trainer(config, precision=precision, world=World(device=torch.device(args.device)))


def views(args: StepArgs, channels_last: bool) -> Batch:
    """The same random views for every variant, on the device and laid out as a loader for that variant would."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.size, args.size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = (torch.rand(shape, generator=generator).half() for _ in range(2))
    q, k = (view.to(args.device).contiguous(memory_format=layout) for view in images)
    return Batch(q, k, np.arange(args.batch_size))


def build_paper(trainer: Trainer) -> Paper:
    """The paper's step with the weights, queue and constants of `trainer`, before its first step.

    Raises UserError where those are of another objective.
    """
    config, module = trainer.config, trainer.module
    if trainer.queue is None or config.loss.symmetric:
        raise UserError(
            f"--recipe {config.recipe}: the paper's step has a queue and one direction, not the objective "
            f"{config.loss.title}; give mocov2 or a recipe of a domain, such as histology-mse or fundus-moco-small"
        )
    names = {name: name.replace("head.", "fc.").removeprefix("backbone.") for name in module.query.state_dict()}
    projectors = module.stage_loss.projectors.children() if isinstance(module.stage_loss, StageBarlow) else ()
    stage_loss: StageLoss = "none" if config.loss.method == "moco" else config.loss.method
    return Paper(
        encoder_state={names[name]: value for name, value in module.query.state_dict().items()},
        queue=trainer.queue.bank,
        projector_states=[projector.state_dict() for projector in projectors],
        arch=config.model.arch,
        mlp=config.model.head == "mlp",
        m=config.loss.ema,
        tau=config.loss.temperature,
        stage_loss=stage_loss,
        stage_weight=config.loss.stage_weight,
        grids=config.loss.grids,
        barlow_scale=config.loss.barlow_scale,
        lambda_offdiag=config.loss.barlow_off_diagonal,
    )


def main(args: StepArgs) -> int:
    """Run the benchmark; status 1 where parity fails."""
    console = Console()
    if args.device == "cpu" and not cpu_has_bf16():
        console.print("this processor has no bfloat16 instructions: expect bf16 to be slower than fp32 here")
    on_cuda = torch.device(args.device).type == "cuda"
    variants = VARIANTS | ON_CUDA if on_cuda else VARIANTS
    trainers = {name: build(args, variant) for name, variant in variants.items()}
    batches = {name: views(args, variant.channels_last) for name, variant in variants.items()}
    paper = build_paper(trainers["fp32 NCHW"])

    def papers_views() -> tuple[Tensor, Tensor]:
        batch = batches["fp32 NCHW"]
        return batch.q.to(args.device, torch.float32), batch.k.to(args.device, torch.float32)

    first = {PAPER: paper.backward(*papers_views())["total"].item()}
    for name, trainer in trainers.items():
        trainer.step([batches[name]], lr=0.0)
        first[name] = trainer.history.read()[0]["loss"]
        # A graph is captured after some launched steps.
        while trainer.graph is not None and not trainer.graph.captured:
            trainer.step([batches[name]], lr=0.0)
            trainer.history.read()
    errors = {name: abs(loss - first[PAPER]) / abs(first[PAPER]) for name, loss in first.items()}
    for name, error in errors.items():
        console.print(f"first loss, {name}: {first[name]:.6f}, off by {error:.1e} (tolerance {LOSS_TOLERANCE:g})")
    if not max(errors.values()) <= LOSS_TOLERANCE:
        console.print("the losses disagree, so no speed is shown")
        return 1

    sgd = trainers["fp32 NCHW"].config.optim
    parameters = [p for module in (paper.query, *paper.projectors) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=sgd.sgd_momentum, weight_decay=sgd.weight_decay)

    def papers_step() -> None:
        paper.backward(*papers_views())
        optimizer.step()

    def stepper(name: str) -> Callable[[], None]:
        def step() -> None:
            trainers[name].step([batches[name]], lr=1e-4)
            trainers[name].history.read()

        return step

    runs = {PAPER: papers_step} | {name: stepper(name) for name in variants}
    # The first losses' steps have warmed up all but the paper's optimiser.
    seconds = interleaved(runs, rounds=args.rounds, device=args.device, warmup=1)
    base = float(np.median(seconds[PAPER]))
    table = Table(title=f"{args.arch}, {args.size} px, batch {args.batch_size}, {args.recipe}: one training step")
    for heading in ("variant", "p20 ms", "p50 ms", "p80 ms", "pairs/s", "against paper"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    rows: list[dict[str, Any]] = []
    for name, samples in seconds.items():
        spread = quantiles(samples)
        pairs = args.batch_size / float(np.median(samples))
        ratio = base / float(np.median(samples))
        table.add_row(name, *(f"{value:.0f}" for value in spread.values()), f"{pairs:.1f}", f"{ratio:.2f}x")
        rows.append(
            {"op": "step", "implementation": name, "recipe": args.recipe, "arch": args.arch, "size": args.size}
            | {"batch": args.batch_size, "precision": str(variants.get(name, PLAIN))}
            | {"as_run": variants.get(name) == as_run(args.device)}
            | spread
            | {"rounds": args.rounds, "pairs_per_s": pairs, "ratio": ratio, "loss_error": errors[name]}
            | environment(args.device)
        )
    console.print(table)
    if args.out is not None:
        save(
            rows,
            args.out,
            title=f"One training step: {args.arch}, {args.size} px, batch {args.batch_size}, {args.recipe}",
            command=f"python -m bench.step --recipe {args.recipe} --arch {args.arch} --size {args.size} "
            f"--batch-size {args.batch_size} --rounds {args.rounds}{' --device cuda' if on_cuda else ''}",
            columns=["implementation", "precision", "p20_ms", "p50_ms", "p80_ms", "pairs_per_s", "ratio", "loss_error"],
        )
    return 0


if __name__ == "__main__":
    start(main, StepArgs, "step")
