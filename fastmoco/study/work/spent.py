"""The time that a pretraining took, all the processes together that went on with it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastmoco.atomic import write_text

METRICS = "metrics.jsonl"
_FILE = "spent.json"


@contextlib.contextmanager
def counted(run: Path | None) -> Iterator[Callable[[], float]]:
    """Counts the seconds of the block, and before them those of earlier blocks on the folder `run`, where there is one.

    Yields what tells them. The count is kept in the folder. A process that was killed counts until it last wrote
    metrics there.
    """
    before = 0.0 if run is None else _earlier(run)
    start = time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - start

    if run is None:
        yield seconds
        return
    run.mkdir(parents=True, exist_ok=True)
    _write(run, {"seconds": before, "began": time.time()})
    try:
        yield seconds
    finally:
        _write(run, {"seconds": seconds()})


def _earlier(run: Path) -> float:
    try:
        found = json.loads((run / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0.0
    killed = 0.0
    if "began" in found and (run / METRICS).is_file():
        killed = max(0.0, (run / METRICS).stat().st_mtime - found["began"])
    return float(found["seconds"] + killed)


def _write(run: Path, values: dict[str, Any]) -> None:
    write_text(run / _FILE, json.dumps(values) + "\n")
