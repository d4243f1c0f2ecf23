"""How long cells take: as others like them took, or as a trial of the network says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from fastmoco.study.cell import Cell
from fastmoco.study.store import Record

# Of a cell, beside the network: files to read and write, probes to fit.
_OVERHEAD = 2.0


class Estimate:
    """Seconds a cell takes one process: the mean of finished cells of its group; else, of its kind's or of all, the
    seconds for each unit of `Cell.work`; else those of the trial, by the side of the images in pixels."""

    def __init__(self, trials: Mapping[int, float]) -> None:
        self._trials = trials
        self._groups: dict[str, list[float]] = defaultdict(list)
        self._kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, cell: Cell, seconds: float) -> None:
        """`cell` took `seconds`."""
        self._groups[cell.group].append(seconds)
        self._kinds[cell.kind].append((seconds, cell.work * self._trials.get(_side(cell), 1.0)))

    def add_all(self, cells: Iterable[Cell], records: Mapping[str, Record], device: str) -> None:
        """The finished among `cells` that ran on `device`."""
        for cell in cells:
            record = records.get(cell.id)
            if record is not None and record["device"] == device:
                self.add(cell, record["seconds"])

    def seconds(self, cell: Cell) -> float:
        """Of one cell."""
        known = self._groups.get(cell.group)
        if known:
            return sum(known) / len(known)
        expected = cell.work * self._trials.get(_side(cell), 1.0)
        like = self._kinds.get(cell.kind)
        if like:
            return expected * sum(s for s, _ in like) / sum(e for _, e in like)
        return _OVERHEAD + expected

    def left(self, cells: Mapping[str, Cell], jobs: int) -> float:
        """Seconds until `jobs` processes have computed all `cells`: no less than the longest chain of them takes."""
        chains: dict[str, float] = {}
        for cell in cells.values():
            before = max((chains.get(need, 0.0) for need in cell.needs), default=0.0)
            chains[cell.id] = before + self.seconds(cell)
        total = sum(self.seconds(cell) for cell in cells.values())
        return max(total / jobs, max(chains.values(), default=0.0))


def _side(cell: Cell) -> int:
    return int(cell.settings["data"]["size"])


def in_words(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
