"""What `fastmoco plan` says of one GPU, beside what the GPU here takes: time of a step, and memory.

Views lie on the device already. The plan counts the driver's own memory too, which the allocator here does not see.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from bench.command import start
from bench.step import StepArgs, Variant, build, views
from bench.timing import cell, environment, interleaved, quantiles, save
from fastmoco.plan.cluster import ClusterConfig
from fastmoco.plan.command import Plan, PlanArgs, make_plan
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer

RECIPES = ("mocov2", "histology-mse", "histology-barlow")
SIZES: tuple[tuple[Literal["resnet18", "resnet50"], int, int], ...] = (("resnet50", 224, 256), ("resnet18", 64, 1024))
COLUMNS = ["recipe", "arch", "size", "batch", "predicted_ms", "step_ms", "graph_ms", "predicted_gb", "peak_gb",
           "graph_peak_gb"]  # fmt: skip


@dataclass(kw_only=True)
class PlannedArgs:
    """Set the plan's times and bytes beside those of the GPU here."""

    gpu: Literal["a100", "h100", "b200"] = "h100"
    """Kind of GPU that the plan is made for."""
    rounds: int = 20
    """Timed steps of each way."""
    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


def plan(args: StepArgs, gpu: Literal["a100", "h100", "b200"]) -> Plan:
    """The plan of what `bench.step.build` builds of `args`."""
    config = find(args.recipe)(Path(), Path())
    return make_plan(
        PlanArgs(
            cluster=ClusterConfig(nodes=1, gpus=1, gpu=gpu),
            views=replace(config.views, size=args.size),
            model=replace(config.model, arch=args.arch),
            loss=config.loss,
            optim=replace(config.optim, batch_size=args.batch_size),
        )
    )


def measured(args: StepArgs, name: str, *, cuda_graph: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of a step called `name`, the median and the 20th and 80th percentile, and the most GB allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer: Trainer = build(args, Variant("bf16", True, cuda_graph=cuda_graph))
    batch = views(args, channels_last=True)

    def step() -> None:
        trainer.step([batch], lr=1e-4)
        trainer.history.read()

    for _ in range(2):
        step()
    while trainer.graph is not None and not trainer.graph.captured:
        step()
    # Before the timing, which takes memory of its own.
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    seconds = interleaved({"step": step}, rounds=rounds, device="cuda")["step"]
    spread = quantiles(seconds)
    return {
        f"{name}_ms": spread["p50_ms"],
        f"{name}_p20_ms": spread["p20_ms"],
        f"{name}_p80_ms": spread["p80_ms"],
        f"{'graph_' if cuda_graph else ''}peak_gb": peak,
    }


def main(args: PlannedArgs) -> int:
    """Run the comparison."""
    if not torch.cuda.is_available():
        print("bench.planned measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    console = Console()
    rows: list[dict[str, Any]] = []
    for arch, size, batch in SIZES:
        for recipe in RECIPES:
            case = StepArgs(recipe=recipe, arch=arch, size=size, batch_size=batch, device="cuda")
            said = plan(case, args.gpu)
            row: dict[str, Any] = {"recipe": recipe, "arch": arch, "size": size, "batch": batch}
            row |= {"predicted_ms": said.prediction.step * 1e3, "predicted_gb": sum(said.memory.values()) / 1e9}
            row |= measured(case, "step", cuda_graph=False, rounds=args.rounds)
            row |= measured(case, "graph", cuda_graph=True, rounds=args.rounds)
            row |= {"rounds": args.rounds}
            console.print("  ".join(f"{name} {cell(row[name])}" for name in COLUMNS), highlight=False)
            rows.append(row | environment("cuda"))
    if args.out is not None:
        save(
            rows,
            args.out,
            title="A step on one GPU: planned and measured",
            command=f"python -m bench.planned --gpu {args.gpu} --rounds {args.rounds}",
            columns=COLUMNS,
            note="bf16, channels-last. Medians of steps, launched one by one and replayed from a CUDA graph; GB are "
            "of 1e9 bytes, the plan's with the driver's own. `predicted_*` are its formulas with the maker's peaks.",
        )
    return 0


if __name__ == "__main__":
    start(main, PlannedArgs, "planned")
