"""Scores of runs with their intervals, and differences of two methods on the same runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmoco.evaluate.intervals import Estimate, Replicates, mean_over_domains, paired, replicates
from fastmoco.evaluate.scores import auc
from fastmoco.evaluate.weighted import Score
from fastmoco.study.report.gather import BASELINES, Findings, Run, Truth

# Redraws of patients, the same for all methods on one set of images.
_SEED = 0


class Statistics:
    """Intervals for one set of images; each is computed once. `draws` replicates each."""

    def __init__(self, found: Findings, draws: int) -> None:
        self.found, self.draws = found, draws
        self._kept: dict[tuple[object, ...], Replicates] = {}

    def estimate(self, measure: str, init: str, budget: float, score: Score = "auc") -> Replicates | None:
        """The mean score over all whole seeds, those that have every draw, with its interval; None without one."""
        runs = self.found.runs(measure, init, budget)
        return self._of(("one", *_source(measure, init), budget), runs, complete(runs), self.found.truth(), score)

    def whole(self, measure: str, inits: Sequence[str], budget: float) -> tuple[int, int]:
        """Seeds, and draws a seed, that the estimate of one of `inits`, or the difference of two, is of."""
        return _counts([self.found.runs(measure, init, budget) for init in inits])

    def whole_of_second(self, inits: Sequence[str]) -> tuple[int, int]:
        """As `whole`, for the second target."""
        return _counts([self.found.second_runs.get(init, {}) for init in inits])

    def second(self, init: str, score: Score = "auc") -> Replicates | None:
        """As `estimate`, for the second target."""
        runs = self.found.second_runs.get(init, {})
        return self._of(("second", init), runs, complete(runs), self.found.truth(second=True), score)

    def difference(self, measure: str, a: str, b: str, budget: float, score: Score = "auc") -> Estimate | None:
        """`a` minus `b` over the runs that both have: the same seeds and the same labels."""
        return self._difference(
            ("one", *_source(measure, a), budget),
            self.found.runs(measure, a, budget),
            ("one", *_source(measure, b), budget),
            self.found.runs(measure, b, budget),
            self.found.truth(),
            score,
        )

    def second_difference(self, a: str, b: str, score: Score = "auc") -> Estimate | None:
        """As `difference`, for the second target."""
        runs, truth = self.found.second_runs, self.found.truth(second=True)
        return self._difference(("second", a), runs.get(a, {}), ("second", b), runs.get(b, {}), truth, score)

    def _difference(
        self,
        key_a: tuple[object, ...],
        runs_a: Mapping[Run, np.ndarray],
        key_b: tuple[object, ...],
        runs_b: Mapping[Run, np.ndarray],
        truth: Truth,
        score: Score,
    ) -> Estimate | None:
        both = complete({run: runs_a[run] for run in runs_a if run in runs_b})
        first = self._of(key_a, runs_a, both, truth, score)
        second = self._of(key_b, runs_b, both, truth, score)
        return paired(first, second) if first is not None and second is not None else None

    def mean_auc(self, measure: str, init: str, budget: float) -> float | None:
        """The mean score alone, without an interval."""
        runs = self.found.runs(measure, init, budget)
        if not complete(runs):
            return None
        truth = self.found.truth()
        values = [auc(runs[run], truth.values, class_names=truth.class_names)[0] for run in complete(runs)]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def _of(
        self, key: tuple[object, ...], runs: Mapping[Run, np.ndarray], chosen: Sequence[Run], truth: Truth, score: Score
    ) -> Replicates | None:
        if not chosen:
            return None
        key = (*key, tuple(chosen), score)
        if key not in self._kept:
            stacked = stack(runs, chosen)
            groups = self.found.groups
            self._kept[key] = replicates(stacked, truth.values, groups, score, draws=self.draws, seed=_SEED)
        return self._kept[key]


def _source(measure: str, init: str) -> tuple[str, str]:
    """A baseline is the same whatever the methods beside it are measured by."""
    return ("baseline", init) if init in BASELINES else (measure, init)


def complete(runs: Mapping[Run, object]) -> list[Run]:
    """The runs of the seeds that have every draw that any seed has, sorted."""
    draws = {draw for _, draw in runs}
    seeds = {seed for seed, _ in runs if all((seed, draw) in runs for draw in draws)}
    return sorted(run for run in runs if run[0] in seeds)


def _counts(each: Sequence[Mapping[Run, object]]) -> tuple[int, int]:
    """Seeds and draws of the runs that all have, of whole seeds."""
    shared = complete({run: None for run in each[0] if all(run in other for other in each)})
    seeds = len({seed for seed, _ in shared})
    return seeds, len(shared) // max(1, seeds)


def stack(runs: Mapping[Run, np.ndarray], chosen: Sequence[Run]) -> np.ndarray:
    """(S, D, n, C) of runs that are complete and sorted."""
    seeds = len({seed for seed, _ in chosen})
    stacked = np.stack([runs[run] for run in chosen])
    return stacked.reshape(seeds, -1, *stacked.shape[1:])


def mean_difference(
    statistics: Sequence[Statistics], measure: str, a: str, b: str, budget: float, score: Score = "auc"
) -> Estimate | None:
    """The mean over all sets of images of `a` minus `b`; None where one of them lacks it."""
    each = [own.difference(measure, a, b, budget, score) for own in statistics]
    known = [estimate for estimate in each if estimate is not None]
    return mean_over_domains(known) if known and len(known) == len(each) else None
