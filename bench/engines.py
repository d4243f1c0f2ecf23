"""Do several processes train as one does, on real images, whatever shares the work out?

One process trains six times: with the images of each batch as they come, and in five other orders, with torch's batch
normalisation in place of ours, whose sums are more exact than those of processes that share statistics; which changes
nothing but how sums are rounded. How far the losses of these six part in the course of the steps is what rounding does
to the method. Then two processes train, under DDP and under DeepSpeed's four stages, and their losses may leave the
first run's by no more than three times that; at the first step by 1e-5.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.command import start
from bench.engines_rank import METHODS, Setting
from bench.timing import environment, save

FIRST_STEP, TIMES = 1e-5, 3.0
ENGINES = {"DDP": "ddp", **{f"DeepSpeed, ZeRO {stage}": f"zero{stage}" for stage in range(4)}}
COLUMNS = ["engine", "method", "first_loss", "first_step_off", "largest_off", "of_rounding", "ratio", "holds"]


@dataclass(kw_only=True)
class EnginesArgs(Setting):
    """Compare the losses of shared steps with those of one process."""

    ranks: int = 2
    """Processes that share the steps; has to divide the batch."""
    out: Path | None = None
    """Markdown file to write; the whole rows are put beside it as JSON."""


def losses(setting: Setting, *, ranks: int, engines: Sequence[str], orders: int) -> dict[str, dict[str, np.ndarray]]:
    """Of each engine and method the (orders, steps) losses. Raises subprocess.CalledProcessError where a process fails.

    The same processes train under one engine after the other: importing DeepSpeed takes them longer than a few steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "losses.json")
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(setting).items()]
        options += [f"--orders={orders}", f"--write={path}", "--engines", *engines]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*(launcher if ranks > 1 else [sys.executable]), "-m", "bench.engines_rank", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            done.check_returncode()
        found = json.loads(path.read_text())
        return {engine: {method: np.array(runs) for method, runs in found[engine].items()} for engine in engines}


def row(name: str, method: str, alone: np.ndarray, shared: np.ndarray) -> dict[str, Any]:
    """How far `shared` (steps,) is from the first of the runs `alone` (orders, steps), and whether that is too far."""
    first, largest = abs(shared[0] - alone[0, 0]), np.abs(shared - alone[0]).max()
    rounding = np.abs(alone[1:] - alone[0]).max()
    return {
        "op": "engines", "engine": name, "method": method, "first_loss": float(alone[0, 0]),
        "first_step_off": float(first), "largest_off": float(largest), "of_rounding": float(rounding),
        "ratio": float(largest / rounding), "holds": bool(first <= FIRST_STEP and largest <= TIMES * rounding),
        "losses": shared.tolist(),
    }  # fmt: skip


def main(args: EnginesArgs) -> int:
    """Run the comparison; status 1 where an engine does not hold."""
    console = Console(width=140, highlight=False)
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    with console.status("one process, six runs of each method (part 1 of 2, minutes)"):
        alone = losses(setting, ranks=1, engines=["auto"], orders=6)["auto"]
    with console.status(f"{args.ranks} processes, every engine and method (part 2 of 2, minutes)"):
        shared = losses(setting, ranks=args.ranks, engines=list(ENGINES.values()), orders=1)
    rows = []
    for name, engine in ENGINES.items():
        for method in METHODS:
            found = row(name, method, alone[method], shared[engine][method][0])
            rows.append(found | asdict(setting) | {"data": args.data.name, "ranks": args.ranks} | environment())
            console.print(
                f"{name}, {method}: first loss {found['first_loss']:.6f}, off by {found['first_step_off']:.1e}; over "
                f"{args.steps} steps by {found['largest_off']:.1e}, where rounding makes {found['of_rounding']:.1e} "
                f"({found['ratio']:.2f} times): {'holds' if found['holds'] else 'FAILS'}"
            )
    if args.out is not None:
        save(
            rows,
            args.out,
            title=f"{args.ranks} processes beside one: {args.arch}, {args.size} px, batch {args.batch_size}, "
            f"normalisation {args.norm}",
            command=f"python -m bench.engines --data {args.data.name} --norm {args.norm}",
            columns=COLUMNS,
            note=f"Losses in float32. first_step_off: from one process's first loss (at most {FIRST_STEP:g}); "
            f"largest_off: over {args.steps} steps; of_rounding: of five runs of one process with the images of "
            f"a batch in other orders, and torch's batch normalisation in place of ours, whose sums are more exact "
            f"than those of processes that share statistics; ratio: at most {TIMES:g}.",
        )
    return 0 if all(found["holds"] for found in rows) else 1


if __name__ == "__main__":
    start(main, EnginesArgs, "engines")
