"""`fastmoco doctor --distributed`: measure, on all nodes at once, what training on them needs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastmoco
from fastmoco.distributed.agreement import largest, texts
from fastmoco.distributed.launch import find_launch, joined
from fastmoco.distributed.monitor import watched
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.preflight.disk import measure_disk, unseen
from fastmoco.preflight.findings import Findings, judge
from fastmoco.preflight.links import clock_offsets, decision_seconds, pair_bandwidths, whole_bandwidth

# Bytes of an all-reduce and of a file: enough to outlast what starts it, and seconds at most.
NETWORK = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
FILE = 64 * 2**20
MEETING_SECONDS = 60.0
# No one measurement takes so long; a folder whose file system hangs would be waited for for ever.
WATCHDOG = 300.0
# More pairs than these fit no table; the slowest are shown.
PAIRS_SHOWN = 12


def preflight(out: Path | None, *, device: str = "auto", timeout: float = MEETING_SECONDS) -> int:
    """Measure and, on rank 0, print. Returns the exit status: 1 on rank 0 where something would stop training.

    out: the folder that the run folders will be in, which every node has to see.

    Raises UserError where this is one process alone, or the processes do not meet.
    """
    launch = find_launch()
    if launch.size == 1:
        raise UserError(
            "doctor --distributed looks at several processes and was started as one: start it as the training, "
            "with srun (in a job of several tasks) or torchrun"
        )
    start = time.monotonic()
    with joined(device, timeout=timeout, launch=launch) as world, watched(world, launch, WATCHDOG) as monitor:
        largest(world, 0)
        return preflight_in(world, out, met=time.monotonic() - start, alive=monitor.alive)


def preflight_in(
    world: World, out: Path | None, *, met: float, node: str | None = None, alive: Callable[[], None] = lambda: None
) -> int:
    """`preflight` as one process of `world`; `met`: seconds that it took to meet; `node`: this one's name.

    `alive` is called after each measurement.
    """
    # A host may be several nodes, in a test of SLURM.
    names = texts(world, node or os.environ.get("SLURMD_NODENAME") or world.host)
    nodes = list(dict.fromkeys(names))
    speakers = [names.index(name) for name in nodes]
    report = _measured(world, nodes.index(names[world.rank]), speakers, out, alive) | {"met": met}
    reports = [json.loads(text) for text in texts(world, json.dumps(report))]
    if not world.first:
        return 0
    found = judge(nodes, reports)
    show(found, out, Console(width=120))
    return 1 if found.problems else 0


def _measured(
    world: World, node: int, speakers: list[int], out: Path | None, alive: Callable[[], None]
) -> dict[str, Any]:
    speaks = speakers[node] == world.rank
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    size = NETWORK[world.device.type]
    alive()
    clocks = clock_offsets(world, speakers)
    pairs = pair_bandwidths(world, speakers, size, alive)
    decision, whole = decision_seconds(world), whole_bandwidth(world, size)
    alive()
    local = measure_disk(Path(tempfile.gettempdir()), FILE) if speaks else None
    alive()
    shared = measure_disk(out, FILE) if speaks and out is not None else None
    alive()
    return {
        "node": node,
        "fastmoco": fastmoco.__version__,
        "torch": torch.__version__,
        "device": f"cuda: {gpu}" if gpu else "cpu",
        "clock": clocks.get(node, 0.0),
        "pairs": [[first, second, speed] for (first, second), speed in pairs.items()],
        "decision": decision,
        "whole": whole,
        "local": asdict(local) if local else None,
        "shared": asdict(shared) if shared else None,
        "unseen": unseen(world, out, speaks=speaks) if out is not None else [],
    }


def show(found: Findings, out: Path | None, console: Console) -> None:
    """Print the tables, and what is wrong."""
    console.print(_nodes(found))
    console.print(_network(found))
    if out is None:
        console.print("the shared folder was not looked at: name the one for the run folders with --out")
    for kind, sentences in (("would stop training", found.problems), ("to be mended", found.remarks)):
        for sentence in sentences:
            console.print(f"{kind}: {sentence}", markup=False, highlight=False, soft_wrap=True)
    if not found.problems:
        console.print(f"{len(found.reports)} processes on {len(found.nodes)} nodes can train together")


def _nodes(found: Findings) -> Table:
    table = Table(title="Nodes", title_justify="left", box=box.SIMPLE)
    table.add_column("node")
    table.add_column("device")
    for heading in ("processes", "met in", "clock", "local write, read", "fsync", "shared write, read", "fsync"):
        table.add_column(heading, justify="right")
    for report in found.of_speakers():
        own = [other for other in found.reports if other["node"] == report["node"]]
        table.add_row(
            found.nodes[report["node"]],
            report["device"],
            str(len(own)),
            f"{max(other['met'] for other in own):.1f} s",
            f"{report['clock'] * 1e3:+.1f} ms",
            *_speed(report["local"]),
            *_speed(report["shared"]),
        )
    return table


def _speed(disk: dict[str, Any] | None) -> tuple[str, str]:
    if disk is None:
        return "-", "-"
    if disk["problem"]:
        return "fails", "-"
    return f"{disk['write'] / 1e6:,.0f}, {disk['read'] / 1e6:,.0f} MB/s", f"{disk['sync'] * 1e3:.1f} ms"


def _network(found: Findings) -> Table:
    table = Table(title="Network", title_justify="left", box=box.SIMPLE)
    table.add_column("between")
    table.add_column("each sends", justify="right")
    pairs = sorted(found.pairs.items(), key=lambda item: item[1])
    for (first, second), speed in pairs[:PAIRS_SHOWN]:
        table.add_row(f"{found.nodes[first]}, {found.nodes[second]}", f"{speed / 1e9:.2f} GB/s")
    if len(pairs) > PAIRS_SHOWN:
        table.add_row(f"{len(pairs) - PAIRS_SHOWN} faster pairs", f"up to {pairs[-1][1] / 1e9:.2f} GB/s")
    slowest = min(report["whole"] for report in found.reports)
    table.add_row(f"all {len(found.reports)} processes", f"{slowest / 1e9:.2f} GB/s")
    decision = max(report["decision"] for report in found.reports)
    table.add_row("agreeing on a number", f"{decision * 1e3:.2f} ms")
    return table
