"""Metrics of a run as a file of JSON lines. Without torch: what asks how far a run is need not wait for that."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastmoco.atomic import write_text

Row = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl` of a run: one line a step, in the order of the steps.

    Rows that cannot be written, to a full disk say, are kept and written with later ones; `warn` is told once.
    """

    def __init__(self, path: Path, *, resume_at: int, warn: Callable[[str], None] = print) -> None:
        self.path = path
        self.warn = warn
        # A killed run may have written rows past the checkpoint that it resumes from.
        kept = [row for row in read_rows(path) if row["step"] <= resume_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        # Unbuffered: what a failed write left over is known, and nothing is written twice.
        self._stream = path.open("ab", buffering=0)
        self._left = b""
        self._lock = threading.Lock()
        self._warned = False

    def write(self, rows: Sequence[Row]) -> None:
        """Append `rows`."""
        with self._lock:
            for row in rows:
                # JSON knows no NaN or infinity: null stands for both.
                finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
                self._left += json.dumps(finite).encode() + b"\n"
        try:
            self._write_left()
        except OSError as error:
            if not self._warned:
                self.warn(f"warning: {self.path} could not be written: {error}; its rows are kept and written later")
            self._warned = True

    def _write_left(self) -> None:
        with self._lock:
            while self._left:
                self._left = self._left[self._stream.write(self._left) :]

    def sync(self) -> None:
        """Bring what was written to the disk, from any thread. Raises OSError where that fails."""
        self._write_left()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file. Raises OSError where rows are left that cannot be written."""
        try:
            self._write_left()
        finally:
            self._stream.close()


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics file; [] where there is none. A line cut short by a kill ends the list."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
