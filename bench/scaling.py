"""What does sharing a step out to several processes cost, in bytes, in time and in processor time?

Processes on this machine, one thread each, over gloo. More of them than cores cannot be faster, so no speed-up is
shown: every process takes shared steps and steps alone in turn, all at the same time, and the difference is the time a
step outside its computing. Prints the bytes that were counted beside those of the plan before any time, and no time
where they disagree.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch.multiprocessing.spawn import start_processes

from bench import scaling_rank
from bench.command import start
from bench.ports import free_port
from bench.scaling_rank import Setting, configure
from bench.timing import cell, environment, quantiles, save
from fastmoco.errors import UserError
from fastmoco.plan.counts import count
from fastmoco.plan.traffic import flows

TOLERANCE = 1e-3
KINDS = ("gradients", "keys", "shuffle", "unshuffle", "projections", "norms", "control")
COLUMNS = ["ranks", "images_a_rank", "shared_p50_ms", "alone_p50_ms", "outside_ms", "shared_cpu_ms", "alone_cpu_ms",
           *(f"{kind}_mb" for kind in KINDS), "sent_mb"]  # fmt: skip


@dataclass(kw_only=True)
class ScalingArgs(Setting):
    """Count and time the steps of 1, 2 and 4 processes on this machine."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; each has to divide the batch."""
    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


def planned(setting: Setting, world: int) -> Counter[str]:
    """Bytes of one step by kind, as the plan has them."""
    config = configure(setting, batch_size=setting.batch_size)
    rows = setting.batch_size // world
    counts = count(config.model, config.loss, size=setting.size, rows=rows, precision=setting.precision)
    found: Counter[str] = Counter()
    for flow in flows(
        counts, config.model, config.loss, size=setting.size, world=world, precision=setting.precision,
        through_copies=setting.precision == "bf16",
    ):  # fmt: skip
        found[flow.kind] += flow.sent(world)  # type: ignore[assignment]
    return found


def run(setting: Setting, world: int) -> dict[str, Any]:
    """What `world` processes measured (bench.scaling_rank). Raises ProcessException of torch's where one fails.

    They are forked from one that has imported all that they need, as importing takes each longer than a step.
    """
    multiprocessing.set_forkserver_preload(["bench.scaling_rank", "bench.timing", "fastmoco.plan.traffic", "tyro"])
    port = free_port() if world > 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "measured.json")
        start_processes(scaling_rank.main, (world, port, setting, path), nprocs=world, start_method="forkserver")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def row(setting: Setting, world: int, found: dict[str, Any]) -> dict[str, Any]:
    """One row of the table: times of the slowest process at each step, processor time of all together."""
    # (ranks, rounds, shared or alone)
    seconds, cpu = np.array(found["seconds"]), np.array(found["cpu_seconds"])
    shared, alone = seconds.max(axis=0).T
    all_shared, all_alone = cpu.sum(axis=0).T
    sent = {f"{kind}_mb": found["sent"].get(kind, 0.0) / 1e6 for kind in KINDS}
    return (
        {"op": "scaling", "ranks": world, "images_a_rank": setting.batch_size // world}
        | {f"shared_{name}": value for name, value in quantiles(list(shared)).items()}
        | {f"alone_{name}": value for name, value in quantiles(list(alone)).items()}
        | {"outside_ms": float(np.median(shared - alone) * 1e3)}
        | {"shared_cpu_ms": float(np.median(all_shared) * 1e3), "alone_cpu_ms": float(np.median(all_alone) * 1e3)}
        | sent
        | {"sent_mb": sum(sent.values())}
        | asdict(setting)
        | environment()
    )


def disagreement(setting: Setting, world: int, sent: dict[str, float]) -> str:
    """Which kinds of bytes are not the plan's, in words; empty where all are. A few bytes of flags are rounded."""
    expected = planned(setting, world)
    wrong = [
        f"{kind}: {sent.get(kind, 0):,.0f} counted, {expected[kind]:,.0f} planned"
        for kind in sorted(expected.keys() | sent.keys())
        if abs(sent.get(kind, 0) - expected[kind]) > max(8.0, TOLERANCE * expected[kind])
    ]
    return "; ".join(wrong)


def main(args: ScalingArgs) -> int:
    """Run the benchmark; status 1 where bytes are not the plan's."""
    console = Console(width=120)
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    for world in args.ranks:
        if args.batch_size % world:
            raise UserError(f"--batch-size {args.batch_size} cannot be shared out evenly to {world} ranks")
    rows = []
    for world in args.ranks:
        found = run(setting, world)
        wrong = disagreement(setting, world, found["sent"])
        if wrong:
            console.print(f"{world} ranks: {wrong}; so no time is shown", highlight=False)
            return 1
        rows.append(row(setting, world, found))
        shown = {name: rows[-1][name] for name in COLUMNS if rows[-1][name]}
        console.print(", ".join(f"{name} {cell(value)}" for name, value in shown.items()), highlight=False)
    if args.out is not None:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(setting).items())
        save(
            rows,
            args.out,
            title=f"Shared steps: {args.arch}, {args.size} px, batch {args.batch_size}, {args.recipe}",
            command=f"python -m bench.scaling {options} --ranks {' '.join(map(str, args.ranks))}",
            columns=COLUMNS,
            note="Medians; shared and alone in turn, all ranks at once, one thread each. Times are those of the "
            "slowest rank, processor times those of all together. Megabytes are those that one rank sends.",
        )
    return 0


if __name__ == "__main__":
    start(main, ScalingArgs, "scaling")
