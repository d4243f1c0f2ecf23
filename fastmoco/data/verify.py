"""Check once, before training, that every file decodes; remember the answer by size and modification time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.atomic import write_text
from fastmoco.data.decode import decode_rgb

# Files checked between two writes of the cache, so that an interrupted check is not lost.
_SAVE_EVERY = 10_000
# Marks what may pass (permissions, a network file system's hiccup, memory) and so is not remembered.
_PASSING = "unreadable just now: "


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and the decoder's reason."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def verify_files(
    root: Path, files: Sequence[str], *, decoder: str, workers: int = 0, progress: bool = True
) -> tuple[np.ndarray, list[Skipped]]:
    """Decode each of `files` (paths relative to `root`) with `decoder`: "pillow" or "dali".

    Returns (n, 2) int32 heights and widths after EXIF rotation, (0, 0) where a file does not decode, and the list
    of those. Answers are cached for each (path, size, modification time, decoder) in the user's cache folder.
    """
    cache = _Cache(root, decoder)
    stamps = {name: _stamp(root / name) for name in files}
    found: dict[str, tuple[int, int] | str] = {}
    unknown = []
    for name, stamp in stamps.items():
        known = cache.get(name, stamp)
        if known is None:
            unknown.append(name)
        else:
            found[name] = known
    for first in range(0, len(unknown), _SAVE_EVERY):
        some = unknown[first : first + _SAVE_EVERY]
        checked = _check(root, some, decoder, workers, progress)
        found |= checked
        for name, outcome in checked.items():
            if not (isinstance(outcome, str) and outcome.startswith(_PASSING)):
                cache.put(name, stamps[name], outcome)
        cache.save()
    sizes = np.zeros((len(files), 2), dtype=np.int32)
    skipped = []
    for i, name in enumerate(files):
        outcome = found[name]
        if isinstance(outcome, str):
            skipped.append(Skipped(name, outcome))
        else:
            sizes[i] = outcome
    return sizes, skipped


def _check(
    root: Path, names: list[str], decoder: str, workers: int, progress: bool
) -> dict[str, tuple[int, int] | str]:
    """Pillow's verdict on every file and, for the DALI decoder, DALI's on those that Pillow takes."""
    found: dict[str, tuple[int, int] | str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=not progress, transient=True) as bar,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        task = bar.add_task("checking images", total=len(names))
        for name, outcome in zip(names, pool.map(lambda name: _pillow_size(root / name), names), strict=True):
            found[name] = outcome
            bar.advance(task)
    if decoder == "dali":
        from fastmoco.data.dali import dali_decodable

        passed = {root / name: name for name, outcome in found.items() if not isinstance(outcome, str)}
        for path, verdict in dali_decodable(list(passed)).items():
            name = passed[path]
            if isinstance(verdict, str):
                found[name] = f"DALI: {verdict}"
            elif tuple(verdict) != found[name]:
                found[name] = f"DALI decodes it to {verdict[0]}x{verdict[1]}, Pillow to {found[name]}"
    return found


def _pillow_size(path: Path) -> tuple[int, int] | str:
    try:
        height, width = decode_rgb(path).shape[:2]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        return f"{_PASSING if passing else ''}{type(error).__name__}: {error}".splitlines()[0]
    return height, width


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        # A dangling link, say: decoding will tell why.
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


class _Cache:
    """A JSON file for each (data folder, decoder): name -> [size, mtime, height, width] or [size, mtime, reason]."""

    def __init__(self, root: Path, decoder: str) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco"
        key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        self._path = base / f"decodable-{decoder}-{key}.json"
        self._entries: dict[str, list[int | str]] = {}
        try:
            self._entries = json.loads(self._path.read_text())
        except (OSError, ValueError):
            # No cache, or a damaged one: the files are simply checked again.
            self._entries = {}

    def get(self, name: str, stamp: tuple[int, int]) -> tuple[int, int] | str | None:
        entry = self._entries.get(name)
        if entry is None or (entry[0], entry[1]) != stamp:
            return None
        return str(entry[2]) if len(entry) == 3 else (int(entry[2]), int(entry[3]))

    def put(self, name: str, stamp: tuple[int, int], outcome: tuple[int, int] | str) -> None:
        tail: list[int | str] = [outcome] if isinstance(outcome, str) else list(outcome)
        self._entries[name] = [*stamp, *tail]

    def save(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self._entries))
        except OSError as error:
            print(f"warning: {self._path} cannot be written ({error}); the files will be checked again next time")
