"""Percentile bootstrap of scores and of their paired differences, over patients, pretraining seeds and label draws.

What is measured is a method: a pretraining seed and a draw of labels make one run, and a run's predictions for the
test set make one score. Three things are left to chance, and another laboratory would draw all three anew: the
patients of the test set, the seed, the labels. One replicate therefore redraws all three, with replacement:

- patients, each with all of its images, the same for every run: the images of one patient are alike, so images
  redrawn one by one would give intervals that are too narrow;
- seeds, and for each seed redrawn, anew, its label draws: draws of one seed share that seed's pretraining.

The replicate's value is the mean over the redrawn runs of their scores on the redrawn patients; the interval runs from
the 2.5th to the 97.5th percentile of the replicates (Efron and Tibshirani 1993, chapter 13). Patients and runs are
redrawn independently and crossed, which counts what is peculiar to a patient in a run more than once, as redrawing
labels within redrawn seeds does with the labels: both err on the wide side (Owen 2007, "The pigeonhole bootstrap",
Annals of Applied Statistics 1; Davison and Hinkley 1997, section 3.8). Nothing is divided by the square root of the
number of label draws: draws from one set of labelled patients, tested on one set of test patients, are not independent
experiments.

What few seeds can show: S seeds redrawn with replacement show (S - 1) / S of the variance between seeds, two thirds at
S = 3, and none at S = 1, where the interval holds for that one pretraining only. With three seeds it is the patients'
part that can be trusted; whether a difference holds for other seeds is better read from `seeds`, the mean of each,
knowing that three seeds agree in sign by mere chance once in four times. In simulations with 3 seeds and 40 patients
(docs/results/coverage.md) the interval of a paired difference held the truth in 97 to 99 % of studies where seeds move
the AUC by 0.02 or less, in 87 % where they move it by 0.07; with patients alone redrawn, in 74 to 90 % and in 52 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastmoco.evaluate.weighted import Score, weighted_score

INTERVAL = "percentile bootstrap, 95 %, patients redrawn with replacement (images where patients are unknown)"
INTERVAL_OF_RUNS = (
    "percentile bootstrap, 95 %, redrawn with replacement: patients (images where patients are unknown), pretraining "
    "seeds, label draws within seeds"
)
DRAWS = 2000
PERCENTILES = (2.5, 97.5)
# Weights (images x draws) at a time: enough to keep numpy busy, few enough to stay in the caches.
_BLOCK = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A score or a difference with its 95 % interval.

    `value` is the point estimate on the data as they are, `low` and `high` the interval; None where undefined, and
    `notes` say why. `samples` (draws,) float64 are the replicates, NaN where undefined. `seeds` (S,) float64 are the
    means of each pretraining seed, for their spread; empty for a mean over domains, whose seeds have nothing in
    common.
    """

    value: float | None
    low: float | None
    high: float | None
    samples: np.ndarray
    seeds: np.ndarray
    notes: tuple[str, ...] = ()

    def share_above(self, threshold: float = 0.0) -> float | None:
        """Share of the defined replicates above `threshold`; None without an interval."""
        defined = self.samples[~np.isnan(self.samples)]
        return None if self.low is None else float((defined > threshold).mean())

    @property
    def p_above(self) -> float | None:
        """Share of the replicates above 0."""
        return self.share_above()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicates(Estimate):
    """An `Estimate` of one method's score, with what a paired difference needs.

    `by_run` (draws, S, D) float64 are the scores of every run in every redraw of the patients, `runs` (S, D) those on
    the patients as they are; NaN: undefined. `score` names the score; `design` tells the redraws apart.
    """

    score: Score
    by_run: np.ndarray = field(repr=False)
    runs: np.ndarray
    design: tuple[int, bytes] = field(repr=False)


def replicates(
    probabilities: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray | None,
    score: Score,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Replicates:
    """The score of S x D runs on one test set, its interval and its replicates, as the module says.

    `probabilities` (S, D, n, C) float are the predictions of D label draws of each of S pretraining seeds, `values`
    (n,) or (n, L) the truth, as in `weighted`. `groups` (n,) are the patients, None: each image alone. S = D = 1 is
    the plain bootstrap over patients. `seed` fixes the redraws: the same seed, images and `draws` redraw the same
    patients for every method, which is what makes `paired` paired.

    A macro score leaves out, in each replicate, the classes or labels that are then undefined. Replicates without any
    are counted in `notes`; where most are, there is no interval. Raises ValueError for shapes that do not fit and for
    probabilities that are not finite.
    """
    probabilities, values = np.asarray(probabilities), np.asarray(values, dtype=np.int64)
    if probabilities.ndim != 4 or probabilities.shape[2] != len(values) or 0 in probabilities.shape:
        raise ValueError(f"probabilities (seeds, draws, images, classes) {probabilities.shape}, values {values.shape}")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite")
    codes = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if codes.shape != (len(values),):
        raise ValueError(f"groups {codes.shape} are not those of {len(values)} images")
    shape = probabilities.shape[:2]
    flat = probabilities.reshape(-1, *probabilities.shape[2:])
    once = np.ones((len(values), 1))
    runs = np.array([weighted_score(score, run, values, once)[0] for run in flat]).reshape(shape)
    count = int(codes.max()) + 1
    by_run = np.full((draws, *shape), np.nan)
    if count > 1:
        rng = np.random.default_rng(seed)
        block = max(1, _BLOCK // len(values))
        for start in range(0, draws, block):
            here = min(block, draws - start)
            times = rng.multinomial(count, np.full(count, 1.0 / count), size=here)
            weights = times.T[codes].astype(np.float64)
            scored = [weighted_score(score, run, values, weights) for run in flat]
            by_run[start : start + here] = np.stack(scored, axis=1).reshape(here, *shape)
    samples = np.einsum("rsd,rsd->r", by_run, run_weights(shape, draws, seed=seed))
    low, high, notes = interval(samples, alone=count < 2)
    return Replicates(
        score=score,
        value=_or_none(runs.mean()),
        low=low,
        high=high,
        samples=samples,
        seeds=runs.mean(axis=1),
        notes=notes,
        by_run=by_run,
        runs=runs,
        design=(seed, codes.tobytes() + values.tobytes()),
    )


def paired(a: Replicates, b: Replicates) -> Estimate:
    """`a` minus `b`, two methods on the same images and redraws: replicate by replicate, run by run.

    Run (s, d) of `a` is compared with run (s, d) of `b`, which saw the same labels; a method with one seed or one
    draw only (a baseline without pretraining) is compared with every seed's or draw's. Raises ValueError where the two
    are not the same score of the same images, patients, seed and number of redraws, or of other numbers of runs.
    """
    if a.score != b.score:
        raise ValueError(f"a paired difference needs the same score of both methods, not {a.score} and {b.score}")
    if a.design != b.design or len(a.samples) != len(b.samples):
        raise ValueError("a paired difference needs both methods on the same images, patients, labels and redraws")
    try:
        difference, runs = a.by_run - b.by_run, a.runs - b.runs
    except ValueError as error:
        raise ValueError(f"runs {a.runs.shape} and {b.runs.shape} cannot be paired") from error
    shape = (runs.shape[0], runs.shape[1])
    samples = np.einsum("rsd,rsd->r", difference, run_weights(shape, len(difference), seed=a.design[0]))
    low, high, notes = interval(samples, alone=False) if a.low is not None and b.low is not None else (None, None, ())
    if low is None:
        notes = tuple(dict.fromkeys((*a.notes, *b.notes)))
    return Estimate(
        value=_or_none(runs.mean()), low=low, high=high, samples=samples, seeds=runs.mean(axis=1), notes=notes
    )


def mean_over_domains(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates on independent data sets, one each: their replicates averaged.

    Each domain's replicates are shuffled first: drawn from one seed they would redraw the same seeds in every domain,
    though pretrainings on different images have nothing in common. Undefined where one of them is. Raises ValueError
    without estimates, or for different numbers of replicates.
    """
    if len({len(estimate.samples) for estimate in estimates}) != 1:
        raise ValueError("a mean over domains needs estimates, all of as many replicates")
    shuffled = [np.random.default_rng([7, k]).permutation(e.samples) for k, e in enumerate(estimates)]
    samples = np.mean(shuffled, axis=0)
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    missing = tuple(dict.fromkeys(note for e in estimates if e.low is None for note in e.notes))
    undefined = any(estimate.low is None for estimate in estimates)
    low, high, notes = (None, None, missing) if undefined else interval(samples, alone=False)
    return Estimate(
        value=float(np.mean(values)) if len(values) == len(estimates) else None,
        low=low,
        high=high,
        samples=samples,
        seeds=np.empty(0),
        notes=notes,
    )


def run_weights(shape: tuple[int, int], draws: int, *, seed: int) -> np.ndarray:
    """(draws, S, D) float64 weights of the runs in each replicate, each replicate's sum 1.

    S seeds are redrawn from S, and D label draws for each time a seed was redrawn. They depend on nothing but the
    arguments, and not on the patients' redraws.
    """
    rng = np.random.default_rng([seed, 1])
    seeds, labels = shape
    times = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=draws)
    return rng.multinomial(labels * times, np.full(labels, 1.0 / labels)) / (seeds * labels)


def interval(samples: np.ndarray, *, alone: bool) -> tuple[float | None, float | None, tuple[str, ...]]:
    """The percentiles of (draws,) replicates that are not NaN, and remarks; `alone`: there was nothing to redraw."""
    if alone:
        return None, None, ("interval undefined: one patient or image, so there is nothing to redraw",)
    kept = samples[~np.isnan(samples)]
    lost = len(samples) - len(kept)
    if lost > len(samples) / 2:
        return None, None, (f"interval undefined: {lost} of {len(samples)} resamples left the score undefined",)
    low, high = np.percentile(kept, PERCENTILES)
    said = f"interval over {len(kept)} of {len(samples)} resamples; the rest left the score undefined"
    return float(low), float(high), (said,) if lost else ()


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
