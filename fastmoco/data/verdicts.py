"""What the check of each file found, remembered in a file of JSON lines that is only ever added to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from fastmoco.data.cache import cache_file
from fastmoco.data.dali_check import dali_version


@dataclass(frozen=True, slots=True)
class Verdict:
    """The size in pixels of a file that decodes, or the `reason` why it does not.

    `dali` says whether DALI's decode agrees; None: it was not asked. `passing` marks a reason that may not hold for
    long (permissions, a network file system's hiccup, memory, a package that is missing) and so is not remembered.
    """

    height: int = 0
    width: int = 0
    dali: bool | None = None
    reason: str = ""
    passing: bool = False


class VerdictFile:
    """Verdicts on the files below `root`: a line holds name, bytes, mtime_ns, height, width, dali, reason, versions.

    Of two lines on one file the last counts; a line that was cut off by a crash is passed over. A verdict holds as
    long as the file's bytes and modification time do; that of DALI, or that a file does not decode, also only as long
    as the decoders' versions.
    """

    def __init__(self, root: Path) -> None:
        self._path = cache_file("checked", root).with_suffix(".jsonl")
        self._host = " ".join(f"{name}-{_version(name)}" for name in ("pillow", "pydicom"))
        self._dali = dali_version() or ""
        self._complained = False

    def find(self, files: list[str], stamps: np.ndarray) -> dict[int, Verdict]:
        """What is known of `files`, whose (bytes, mtime_ns) now are `stamps` (n, 2): verdicts by place in the list."""
        try:
            stream = self._path.open("rb")
        except OSError:
            return {}
        places = {name: i for i, name in enumerate(files)}
        known: dict[int, Verdict] = {}
        with stream:
            for line in stream:
                try:
                    name, size, mtime, height, width, dali, reason, host, by = json.loads(line)
                    place = places.get(name)
                    if place is None or (stamps[place, 0], stamps[place, 1]) != (size, mtime):
                        continue
                    if reason and host != self._host:
                        continue
                    known[place] = Verdict(int(height), int(width), dali if by == self._dali else None, str(reason))
                except (ValueError, TypeError):
                    # Half a line, or something else entirely: that file is checked again.
                    continue
        return known

    def add(self, found: Iterable[tuple[str, np.ndarray, Verdict]]) -> None:
        """Remember (name, (bytes, mtime_ns), verdict) of each; passing ones are left out."""
        lines = [
            json.dumps(
                [name, int(stamp[0]), int(stamp[1]), verdict.height, verdict.width, verdict.dali, verdict.reason,
                 self._host, self._dali]
            )
            for name, stamp, verdict in found
            if not verdict.passing
        ]  # fmt: skip
        if not lines:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as stream:
                # In one write, begun on a line of its own whatever a crash has left before it.
                stream.write(("\n" + "\n".join(lines) + "\n").encode())
        except OSError as error:
            if not self._complained:
                print(f"warning: {self._path} cannot be written ({error}); the files will be checked again next time")
            self._complained = True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
