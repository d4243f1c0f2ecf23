"""What every benchmark shares: interleaved timing, medians, and where it ran."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco import __version__
from fastmoco.atomic import write_text
from fastmoco.errors import UserError

# Larger than any level-2 cache so far (H200: 60 MB).
EVICTION_BYTES = 256 << 20


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each of `runs` in `rounds` rounds, one of each in turn, so that all meet the same disturbances.

    On CUDA the events around a run are read, and the level-2 cache is emptied before it, as the rest of a training
    step would have done.
    """
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _seconds
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(clock(run))
    return seconds


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in milliseconds."""
    return {f"p{q}_ms": float(np.percentile(seconds, q) * 1e3) for q in (20, 50, 80)}


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Replays of `run` from a CUDA graph: what the device alone takes, without Python and launches.

    Raises RuntimeError where `run` cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: device, threads, versions, load and time."""
    where: dict[str, Any] = {"device": device, "processor": _processor(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        where |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    where |= {"load_1min": round(os.getloadavg()[0], 2), "python": platform.python_version()}
    where["torch"] = str(torch.__version__)
    for name in ("triton", "lightly"):
        # Imported or not: what was measured may have been in other processes.
        with contextlib.suppress(metadata.PackageNotFoundError):
            where[name] = metadata.version(name)
    return where | {
        "fastmoco": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save(
    rows: list[dict[str, Any]],
    path: Path,
    *,
    title: str,
    command: str,
    columns: list[str],
    note: str = "Medians of interleaved runs.",
) -> None:
    """Write `rows` as Markdown to `path` (.md), showing `columns`, and whole as a JSON list beside it.

    Rows that do not say where they were measured, were so here and now. `command` is told with `--out`. Raises
    UserError where they cannot be written.
    """
    here = environment(rows[0]["device"] if rows else "cpu")
    rows = [row if "time" in row else row | here | row for row in rows]
    # An absolute path would be of this machine alone.
    command += f" --out {path.name if path.is_absolute() else path}"
    lines = [f"# {title}", "", f"Written by `{command}`.", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    where = ", ".join(f"{name} {value}" for name, value in here.items())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
        write_text(path, "\n".join([*lines, "", f"{note} Ran on: {where}.", ""]))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from error


def cell(value: object) -> str:
    """A value as a table shows it: three digits of a number, or all before the point; a dash for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    # No exponent where there are more than three digits before the point.
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _cuda_seconds(run: Callable[[], object]) -> float:
    _eviction_buffer().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _eviction_buffer() -> Tensor:
    return torch.empty(EVICTION_BYTES, dtype=torch.uint8, device="cuda")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
