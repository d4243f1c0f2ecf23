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
from fastmoco.data.decode import decode
from fastmoco.data.store import BadFile, Files
from fastmoco.data.undecodable import Undecodable

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


@dataclass(frozen=True)
class Checked:
    """What a check found of n files, in their order.

    `sizes` (n, 2) int32: heights and widths after EXIF rotation, (0, 0) where a file does not decode. `stamps` (n, 2)
    int64: bytes and modification time in ns. `dali` (n,) bool: whether DALI may decode the file.
    """

    sizes: np.ndarray
    stamps: np.ndarray
    dali: np.ndarray


def verify_files(
    root: Path, files: Sequence[str], *, decoder: str, workers: int = 0, progress: bool = True
) -> tuple[Checked, list[Skipped]]:
    """Decode each of `files` (paths relative to `root`) with `decoder`: "pillow" or "dali".

    Returns what was found, and the list of those that do not decode. Answers are cached for each (path, size,
    modification time, decoder) in the user's cache folder.
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
    times = np.array([stamps[name] for name in files], dtype=np.int64).reshape(-1, 2)
    return Checked(sizes, times, np.full(len(files), decoder == "dali")), skipped


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
        from fastmoco.data.dali_check import dali_decodable

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
        height, width = decode(Files(path.parent).read(path.name, None), path.name).shape[:2]
    except Undecodable as error:
        return str(error)
    except (BadFile, MemoryError) as error:
        return _PASSING + (error.reason if isinstance(error, BadFile) else "not enough memory")
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
