"""The finished cells of a study, sorted by what they are of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmoco.study.cell import Cell
from fastmoco.study.cells import RANDOM, SECOND, draws
from fastmoco.study.config import SCRATCH, Data, Study
from fastmoco.study.report.words import share
from fastmoco.study.store import Damaged, Record, Store
from fastmoco.study.work.baselines import COLOUR, GRAY
from fastmoco.study.work.numbers import unpack
from fastmoco.study.work.similarity import STAGES

BASELINES = (COLOUR, GRAY)
# What is measured of a start: fine-tuned whole, a linear layer trained with augmentation, a probe of one stage, or of
# the stage that is best on the validation images.
FULL, LINEAR, BEST = "full", "linear", "best stage"

Run = tuple[int, int]
"""Pretraining seed and label draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What the draws of a budget had: least and greatest number of `images`, and their `shares` of the training images.
    `more`: more than was asked for."""

    images: tuple[int, int]
    shares: tuple[float, float]
    more: bool

    def __str__(self) -> str:
        """14 images, 5.7 %."""
        shares = [f"{100 * part:.3g}" for part in self.shares]
        return f"{_span([str(count) for count in self.images])} images, {_span(shares)} %"


def _span(ends: list[str]) -> str:
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A target on the test images: `values` (n,) or (n, L) as in `Target`."""

    kind: Any
    class_names: list[str]
    values: np.ndarray


class Findings:
    """What the finished cells say of one set of images."""

    def __init__(self, study: Study, data: Data, records: Mapping[str, Record]) -> None:
        self.study, self.data = study, data
        own = [record for record in records.values() if record["settings"]["data"]["name"] == data.name]
        self.records = own
        described = next((record["result"] for record in own if record["kind"] == "data"), None)
        self.described: dict[str, Any] | None = described
        self._runs: dict[tuple[str, str, float], dict[Run, np.ndarray]] = {}
        self.second_runs: dict[str, dict[Run, np.ndarray]] = {}
        self._probes: dict[tuple[str, float, int, int], list[dict[str, Any]]] = {}
        # Remarks on the runs of a measure, a start and a budget.
        self._notes: dict[tuple[str, str, float], list[str]] = {}
        for record in own:
            self._sort(record)
        self._choose_stages()

    @property
    def inits(self) -> tuple[str, ...]:
        """Starts of full fine-tuning, in the order of the study."""
        return self.study.grid.methods

    @property
    def probed(self) -> tuple[str, ...]:
        """Frozen encoders, random weights first."""
        return (RANDOM, *self.study.pretrained)

    @property
    def linear(self) -> tuple[str, ...]:
        """Starts under a linear layer that is trained with augmentation; from scratch, that is random weights."""
        return tuple(RANDOM if method == SCRATCH else method for method in self.inits)

    @property
    def groups(self) -> np.ndarray:
        """(n,) patients of the test images."""
        assert self.described is not None
        return np.asarray(self.described["test_groups"])

    def truth(self, second: bool = False) -> Truth:
        """The target, or the second one."""
        assert self.described is not None
        found = self.described["targets"][SECOND if second else self.data.label]
        return Truth(kind=found["kind"], class_names=found["class_names"], values=np.asarray(found["test"]))

    def runs(self, measure: str, init: str, budget: float) -> dict[Run, np.ndarray]:
        """Test probabilities (n, C) of every run of `init` at `budget`. A baseline has the same under every probe."""
        if init in BASELINES:
            measure = "baseline"
        return self._runs.get((measure, init, budget), {})

    def planned(self, measure: str, budget: float) -> tuple[int, int]:
        """Seeds, and draws of the labels a seed, that the study asks for."""
        many = self.study.finetuning.draws if measure in (FULL, LINEAR) else self.study.probes.draws
        return len(self.study.grid.seeds), len(draws(budget, many))

    def notes(self, measure: str, init: str, budget: float) -> list[str]:
        """What is to be said of single runs, with how many it is true of."""
        if init in BASELINES:
            measure = "baseline"
        counts = Counter(self._notes.get((measure, init, budget), []))
        return [f"{text} ({n} {'run' if n == 1 else 'runs'})" for text, n in sorted(counts.items())]

    def used(self, budget: float) -> Used | None:
        """What the draws of `budget` had; None where none is known."""
        rows = [row for row in self.budgets() if row["budget"] == budget]
        if not rows:
            return None
        counts, shares = [row["images"] for row in rows], [row["used"] for row in rows]
        return Used(
            images=(min(counts), max(counts)), shares=(min(shares), max(shares)), more=max(shares) > budget + 1e-9
        )

    def asked(self, budget: float) -> str:
        """A budget in words; where more labels than asked were used, with what was: "1 % (14 images, 5.7 %)"."""
        used = self.used(budget)
        return share(budget) + (f" ({used})" if used is not None and used.more else "")

    def of_kind(self, kind: str) -> list[Record]:
        """The finished cells of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    def budgets(self) -> list[dict[str, Any]]:
        """A row for each draw of labels that was made: the same for every method."""
        rows = {}
        for record in self.records:
            for row in record["result"].get("budgets", []):
                rows[row["budget"], row["seed"], row["draw"]] = row
            row = record["result"].get("budget")
            if row is not None and record["settings"]["target"] != SECOND:
                rows.setdefault((row["budget"], row["seed"], row["draw"]), row)
        return [rows[key] for key in sorted(rows)]

    def chosen_stages(self, init: str, budget: float) -> dict[str, int]:
        """How often each set of features was the best on the validation images."""
        counts: dict[str, int] = {}
        for (own, at, _, _), rows in self._probes.items():
            if own == init and at == budget and (best := _best(rows)) is not None:
                counts[best["features"]] = counts.get(best["features"], 0) + 1
        return dict(sorted(counts.items()))

    def _sort(self, record: Record) -> None:
        settings, result = record["settings"], record["result"]
        if record["kind"] == "finetune":
            run = settings["seed"], settings["draw"]
            found = unpack(result["probabilities"])
            if settings["target"] == SECOND:
                self.second_runs.setdefault(settings["init"], {})[run] = found
            else:
                key = settings["mode"], settings["init"], settings["budget"]
                self._runs.setdefault(key, {})[run] = found
        elif record["kind"] in ("probes", "baselines"):
            for row in result["probes"]:
                baseline = record["kind"] == "baselines"
                init = row["features"] if baseline else settings["init"]
                measure = "baseline" if baseline else row["features"]
                self._notes.setdefault((measure, init, row["budget"]), []).extend(row.get("notes", []))
                if "probabilities" not in row:
                    continue
                run = row["seed"], row["draw"]
                self._runs.setdefault((measure, init, row["budget"]), {})[run] = unpack(row["probabilities"])
                if not baseline:
                    self._probes.setdefault((init, row["budget"], *run), []).append(row)

    def _choose_stages(self) -> None:
        for (init, budget, seed, draw), rows in self._probes.items():
            best = _best(rows)
            if best is not None:
                found = unpack(best["probabilities"])
                self._runs.setdefault((BEST, init, budget), {})[seed, draw] = found
                self._notes.setdefault((BEST, init, budget), []).extend(best.get("notes", []))


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of one run's probes the one with the best validation AUC; of equal ones that of the last stage."""
    stages = [row for row in rows if row["features"] in STAGES and row["validation_auc"] is not None]
    return max(stages, key=lambda row: (row["validation_auc"], row["features"]), default=None)


def read_records(store: Store, cells: Mapping[str, Cell]) -> tuple[dict[str, Record], list[str]]:
    """The records of the finished among `cells`, and what is wrong with files that cannot be used."""
    records, damaged = {}, []
    for cell in cells.values():
        try:
            record = store.read(cell.id)
        except Damaged as error:
            damaged.append(str(error))
            continue
        if record is not None and record["hash"] == cell.hash:
            records[cell.id] = record
    return records, damaged
