"""What a search found, as rows of a file and as tables."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.search_scores import FOLDS
from fastmoco.atomic import write_text

SHOWN = {f"stage{s}": f"probe {s}" for s in range(1, 5)} | {"linear": "linear", "full": "tuned"}
Row = dict[str, Any]
"""Of one trial and method: "data", "trial", "than", "method", "seed", "device", "pretrain", "finetune", "settings"
(their hash), "labels" and "scores" by budget."""


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a table for each set of images."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        every = {(b, name) for row in own for b, scores in row["scores"].items() for name in scores}
        shown = [(b, n) for b in sorted({b for b, _ in every}, key=float) for n in SHOWN if (b, n) in every]
        labels = own[0]["labels"]
        head = [
            "trial",
            "method",
            "on",
            "compared with",
            *(f"{SHOWN[name]}, {labels[budget]}" for budget, name in shown),
        ]
        lines += ["", f"## {data}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in own:
            than = _compared(row, own)
            said = "-" if than is None else f"{than['trial']}, {than['method']}"
            cells = [
                row["trial"],
                row["method"],
                row["device"],
                said,
                *(_score(row, than, budget, name) for budget, name in shown),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _compared(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the trial that `row` is compared with: of its own method, else of MoCo, of one seed."""
    for method in (row["method"], "moco"):
        for other in rows:
            if (other["trial"], other["method"], other["seed"]) == (row["than"], method, row["seed"]):
                return None if other is row else other
    return None


def _score(row: Row, than: Row | None, budget: str, name: str) -> str:
    """The mean AUC; how many points that is above the other's, and on how many folds it is above."""
    own = row["scores"].get(budget, {}).get(name)
    other = None if than is None else than["scores"].get(budget, {}).get(name)
    if own is None:
        return "-"
    if other is None:
        return f"{mean(own):.3f}"
    better = sum(a > b for a, b in zip(own, other, strict=True))
    return f"{mean(own):.3f} ({100 * (mean(own) - mean(other)):+.1f}, {better}/{FOLDS})"


class Results:
    """The file of all rows, and the table beside it; several processes may add to it. `trials` are sets of images and
    names, in the order in which they are shown."""

    def __init__(self, out: Path, trials: Sequence[tuple[str, str]], lock: Path, head: str) -> None:
        self.out, self.lock, self.head = out, lock, head
        self.order = {trial: place for place, trial in enumerate(trials)}

    def has(self, data: str, trial: str, method: str, settings: str) -> bool:
        """Whether there is a row with these settings."""
        row = self._rows().get((data, trial, method))
        return row is not None and row["settings"] == settings

    def add(self, row: Row) -> None:
        """Keep `row`, in the order of the trials; rows of trials that are no more are left out."""
        with self.lock.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            rows = self._rows() | {(row["data"], row["trial"], row["method"]): row}
            kept = [r for r in rows.values() if (r["data"], r["trial"]) in self.order]
            kept.sort(key=lambda r: self.order[r["data"], r["trial"]])
            write_text(self.out, json.dumps(kept, indent=1) + "\n")
            write_text(self.out.with_suffix(".md"), "\n".join([self.head, *table(kept)]) + "\n")

    def _rows(self) -> dict[tuple[str, str, str], Row]:
        rows = json.loads(self.out.read_text()) if self.out.is_file() else []
        return {(row["data"], row["trial"], row["method"]): row for row in rows}
