"""What every benchmark shares: interleaved timing, medians, and where it ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco import __version__
from fastmoco.atomic import write_text


def interleaved(runs: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each of `runs` in `rounds` rounds, one of each in turn, so that all meet the same disturbances."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in milliseconds."""
    return {f"p{q}_ms": float(np.percentile(seconds, q) * 1e3) for q in (20, 50, 80)}


def environment() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, load and time."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmoco": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save(rows: list[dict[str, Any]], path: Path, *, title: str, command: str, columns: list[str]) -> None:
    """Write `rows` as Markdown to `path` (.md), showing `columns`, and whole as a JSON list beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    lines = [f"# {title}", "", f"Written by `{command}`.", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    where = ", ".join(f"{name} {value}" for name, value in environment().items())
    write_text(path, "\n".join([*lines, "", f"Medians of interleaved steps. Ran on: {where}.", ""]))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
