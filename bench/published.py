"""What the plan's formulas say of training runs whose speed was published, beside that speed.

MLPerf's ResNet-50 on H100: the share of the peaks that kernels reach and the time of a step that the formulas know
nothing of are fitted to the two smaller runs; the largest is then predicted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import Tensor

from bench.command import start
from bench.timing import cell, save
from fastmoco.plan.cluster import ClusterConfig
from fastmoco.plan.operations import Operations, record
from fastmoco.plan.predict import Prediction, predict
from fastmoco.plan.traffic import Flow, buckets

# MLPerf Training, ResNet-50: nodes of 8 H100, images a GPU, images/s of all.
PUBLISHED = ((1, 400, 57_256.0), (8, 50, 314_299.0), (316, 16, 6_860_000.0))
# A node has eight adapters of 400 Gb/s.
NODE = ClusterConfig(gpus=8, gpu="h100", between_gb_s=400.0)
PARAMETERS = 25_557_032
COLUMNS = ["assumed", "gpus", "images_a_gpu", "published_a_gpu", "predicted_a_gpu", "published_efficiency",
           "predicted_efficiency", "step_ms", "exposed_ms"]  # fmt: skip


@dataclass(kw_only=True)
class PublishedArgs:
    """Set the plan's predictions beside published runs."""

    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


@functools.cache
def classification(rows: int) -> Operations:
    """A step of a ResNet-50 that learns 1,000 classes from (rows, 3, 224, 224), in half precision."""
    with torch.device("meta"):
        model = torchvision.models.resnet50().bfloat16().to(memory_format=torch.channels_last)
        images = torch.empty(rows, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        labels = torch.empty(rows, dtype=torch.int64)

    def run() -> Tensor:
        return torch.nn.functional.cross_entropy(model(images), labels)

    return record(run, [*model.parameters(), *model.buffers(), images, labels])[0]


def predicted(cluster: ClusterConfig, rows: int) -> Prediction:
    """The step, with gradients in half precision summed while the backward runs."""
    gradients = Flow("gradients", "sum", 2.0 * PARAMETERS, len(buckets(2.0 * PARAMETERS)), "backward")
    # LARS reads and writes weights and momentum, and reads gradients: 20 bytes a parameter.
    return predict(cluster, classification(rows), [gradients], update_bytes=20.0 * PARAMETERS, rows=rows)


def fitted() -> ClusterConfig:
    """NODE with `reached` and `overhead_ms` such that the two smaller runs come out as published."""
    cluster = NODE
    (_, large, one), (nodes, small, eight) = ((n, rows, rate / (8 * n)) for n, rows, rate in PUBLISHED[:2])
    for _ in range(40):
        # In turn: the larger batch says how fast kernels are, the smaller what a step costs besides.
        step = predicted(cluster, large).step
        scale = (step - cluster.overhead_ms / 1e3) / (large / one - cluster.overhead_ms / 1e3)
        cluster = replace(cluster, reached=cluster.reached * scale)
        missing = small / eight - predicted(replace(cluster, nodes=nodes), small).step
        cluster = replace(cluster, overhead_ms=max(0.0, cluster.overhead_ms + missing * 1e3))
    return cluster


def calibrated() -> ClusterConfig:
    """NODE with `reached` such that the smallest run comes out as published, and nothing else."""
    cluster = NODE
    _, rows, rate = PUBLISHED[0]
    for _ in range(20):
        cluster = replace(cluster, reached=cluster.reached * predicted(cluster, rows).step / (rows / (rate / 8)))
    return cluster


def main(args: PublishedArgs) -> int:
    """Print the table; status 0."""
    console = Console(width=140)
    table: list[dict[str, Any]] = []
    for assumed, cluster in (("formulas alone", calibrated()), ("and a fixed cost", fitted())):
        base: tuple[float, float] | None = None
        for nodes, rows, rate in PUBLISHED:
            result = predicted(replace(cluster, nodes=nodes), rows)
            speed, published = rows / result.step, rate / (8 * nodes)
            base = base or (published, speed)
            table.append({
                "assumed": assumed, "device": "cpu", "gpus": 8 * nodes, "images_a_gpu": rows,
                "published_a_gpu": round(published), "predicted_a_gpu": round(speed),
                "published_efficiency": published / base[0], "predicted_efficiency": speed / base[1],
                "step_ms": result.step * 1e3, "exposed_ms": sum(result.exposed.values()) * 1e3,
                "reached": cluster.reached, "overhead_ms": cluster.overhead_ms,
            })  # fmt: skip
        text = f"{assumed}: {cluster.reached:.3f} of the peaks reached, {cluster.overhead_ms:.2f} ms a step besides"
        console.print(text, highlight=False)
    for row in table:
        console.print(*(f"{name} {cell(row[name])}" for name in COLUMNS), sep="  ", highlight=False)
    if args.out is not None:
        save(
            table,
            args.out,
            title="The plan's predictions beside published runs",
            command="python -m bench.published",
            columns=COLUMNS,
            note="Images/s of MLPerf's ResNet-50 on H100; predictions, no measurement of ours.",
        )
    return 0


if __name__ == "__main__":
    start(main, PublishedArgs, "published")
