"""`fastmoco plan`: what a run on many GPUs will send, hold and take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from fastmoco.arguments import read_arguments
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.plan.cluster import ClusterConfig
from fastmoco.plan.counts import Counts, count
from fastmoco.plan.memory import memory
from fastmoco.plan.predict import Prediction, predict
from fastmoco.plan.traffic import Flow, flows
from fastmoco.train.config import Config, LossConfig, ModelConfig, OptimConfig
from fastmoco.train.copies import uses_copies
from fastmoco.train.recipes import find


@dataclass(kw_only=True)
class PlanArgs:
    """Work out what a run on many GPUs sends, holds and takes; docs/distributed.md states the formulas."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the encoders."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """What shares the work out."""
    zero: Literal[0, 1, 2, 3] = 1
    """Stage of ZeRO under --engine deepspeed."""


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found; bytes and seconds of one optimiser step."""

    world: int
    rows: int
    counts: Counts
    flows: list[Flow]
    memory: dict[str, float]
    prediction: Prediction
    pairs_per_s: float


def make_plan(args: PlanArgs) -> Plan:
    """The plan of `args`. Raises UserError where the batch cannot be shared out."""
    cluster, optim, loss = args.cluster, args.optim, args.loss
    world = cluster.world
    if optim.batch_size % world:
        raise UserError(
            f"--batch-size {optim.batch_size} cannot be shared out evenly to {world} GPUs ({cluster.nodes} nodes of "
            f"{cluster.gpus}): choose a multiple of {world}"
        )
    rows = optim.batch_size // world
    counts = count(args.model, loss, size=args.views.size, rows=rows, precision=args.precision, world=world)
    through_copies = args.engine == "ddp" and uses_copies(optim, args.precision)
    sent = flows(
        counts, args.model, loss, size=args.views.size, world=world, precision=args.precision,
        accumulate=optim.accumulate, through_copies=through_copies, engine=args.engine, zero=args.zero,
    )  # fmt: skip
    held = memory(
        counts, args.model, loss, size=args.views.size, world=world, precision=args.precision,
        momentum=optim.sgd_momentum > 0, through_copies=through_copies, engine=args.engine, zero=args.zero,
    )  # fmt: skip
    # SGD and the average in one pass, 28 bytes a float32 parameter (docs/kernels.md), and the copies written.
    share = 1 / world if args.engine == "deepspeed" and args.zero else 1.0
    update = 28.0 * counts.trained * share + (2.0 * counts.copied if through_copies else 0.0)
    prediction = predict(
        cluster, counts.operations, sent, update_bytes=update, half=args.precision != "fp32",
        accumulate=optim.accumulate, rows=rows,
    )  # fmt: skip
    pairs = optim.batch_size * optim.accumulate / prediction.step
    return Plan(world, rows, counts, sent, held, prediction, pairs)


def plan_command(args: list[str]) -> int:
    """Print the plan. Returns the exit status, 0; raises UserError for a mistake."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: fastmoco plan RECIPE [--nodes 4 --gpus 8 --gpu h100 --batch-size 1024] [OPTIONS]\n")
        print("`fastmoco plan RECIPE --help` lists every option; `fastmoco recipes` lists the recipes.")
        return 0
    if not args or args[0].startswith("-"):
        raise UserError("name a recipe first: fastmoco plan RECIPE --nodes 4 --gpus 8 (see fastmoco recipes)")
    name = args[0]
    config: Config = find(name)(tyro.MISSING, tyro.MISSING)
    options = read_arguments(
        PlanArgs,
        prog=f"fastmoco plan {name}",
        description=f"Work out what a run of the recipe {name} on many GPUs sends, holds and takes.",
        default=PlanArgs(views=config.views, model=config.model, loss=config.loss, optim=config.optim),
        args=args[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    show(options, make_plan(options), Console(width=110))
    return 0


def show(args: PlanArgs, plan: Plan, console: Console) -> None:
    """Print `plan` to `console`."""
    cluster, backend = args.cluster, args.cluster.backend
    engine = f"DeepSpeed ZeRO {args.zero}" if args.engine == "deepspeed" else "DDP"
    console.print(
        f"{args.model.arch}, {args.views.size} px, {args.loss.title}; {cluster.nodes} x {cluster.gpus} "
        f"{cluster.gpu.upper()}, {engine}, {args.precision}; batch {args.optim.batch_size} x "
        f"{args.optim.accumulate}, {plan.rows} images a GPU\n",
        highlight=False,
    )
    sent = _table("Sent in a step", "for", "how", "calls", "a GPU, MB", "a node, MB", "ms", "waited for, ms")
    totals = [0.0, 0.0]
    waited = plan.prediction.exposed
    for i, flow in enumerate(plan.flows):
        last = all(other.kind != flow.kind for other in plan.flows[i + 1 :])
        moved = flow.moved(plan.world, backend)
        between = flow.between(plan.world, cluster.gpus, backend)
        totals = [totals[0] + moved, totals[1] + between]
        sent.add_row(
            flow.kind, flow.collective, str(flow.calls), f"{moved / 1e6:,.3f}", f"{between / 1e6:,.3f}",
            f"{cluster.seconds(flow) * 1e3:.2f}", f"{waited[flow.kind] * 1e3:.2f}" if last else "",
        )  # fmt: skip
    sent.add_row(
        "together", "", "", f"{totals[0] / 1e6:,.3f}", f"{totals[1] / 1e6:,.3f}",
        f"{sum(plan.prediction.sending.values()) * 1e3:.2f}", f"{sum(waited.values()) * 1e3:.2f}",
    )  # fmt: skip
    console.print(sent if plan.flows else "One GPU: nothing is sent.")
    held = _table("\nHeld by a GPU", "part", "GB")
    for part, size in plan.memory.items():
        held.add_row(part, f"{size / 1e9:.2f}")
    total, room = sum(plan.memory.values()) / 1e9, cluster.device.memory_gb
    held.add_row("together", f"{total:.2f} of {room:.0f}")
    console.print(held)
    if total > room:
        console.print("It does not fit: lower --batch-size, raise --accumulate, or take more GPUs.", highlight=False)
    p, images = plan.prediction, plan.rows * args.optim.accumulate
    source = "measured" if cluster.step_ms or cluster.pairs_per_s else "predicted"
    flops = plan.counts.operations.flops.sum() * args.optim.accumulate
    console.print(
        f"\nA step, {source} for one GPU: {flops / images / 1e9:.1f} GFLOP a pair; forward {p.forward * 1e3:.2f} ms, "
        f"backward {p.backward * 1e3:.2f}, update {p.update * 1e3:.2f}"
        + (f", overhead {p.overhead * 1e3:.2f}" if p.overhead else "")
        + f"\nPredicted: {p.step * 1e3:.2f} ms a step, {plan.pairs_per_s:,.0f} pairs/s, "
        f"{plan.pairs_per_s / plan.world:,.0f} a GPU; efficiency {p.efficiency:.3f} "
        "(of GPUs with the same images each that need not send)",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column == "how" else "right")
    return table
