"""How often do the intervals hold the truth? Simulated studies, many times over, whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from bench.command import start
from fastmoco.atomic import write_text
from fastmoco.evaluate.intervals import PERCENTILES, Replicates, paired, replicates

PATIENTS, IMAGES = 40, 8
SIGNAL = 1.5
# Standard deviations of a score's parts: of the patient and of the image, the same for every run; of the patient in
# one seed, of the patient in one label draw, of the image in one run.
PATIENT, IMAGE, PATIENT_SEED, PATIENT_LABELS, RUN = 1.0, 0.5, 0.5, 0.3, 0.7
WAYS = ("images alone", "patients alone", "patients, seeds, labels")


@dataclass(frozen=True, slots=True)
class Setting:
    """A study: pretraining seeds, label draws a seed, and how much (standard deviations) they move the signal."""

    seeds: int
    draws: int
    of_seed: float
    of_labels: float


SETTINGS = (
    Setting(1, 1, 0.0, 0.0),
    Setting(3, 7, 0.0, 0.3),
    Setting(3, 7, 0.15, 0.3),
    Setting(3, 2, 0.15, 0.3),
    Setting(3, 1, 0.15, 0.15),
    Setting(3, 1, 0.5, 0.3),
)


@dataclass(kw_only=True)
class CoverageArgs:
    """Simulate studies of known truth and count how often 95 % intervals of AUCs and of paired differences hold it."""

    trials: int = 300
    """Simulated studies a setting."""
    replicates: int = 500
    """Replicates an interval."""
    out: Path = Path("docs/results/coverage.md")
    """Markdown file to write."""


def predictions(rng: np.random.Generator, setting: Setting, common: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(S, D, n, 2) scores of one method: binormal, their mistakes shared with all runs, within a seed, and by none."""
    shape, n = (setting.seeds, setting.draws), len(labels)
    signal = (
        SIGNAL + setting.of_seed * rng.normal(size=(shape[0], 1, 1)) + setting.of_labels * rng.normal(size=(*shape, 1))
    )
    of_seed = PATIENT_SEED * np.repeat(rng.normal(size=(shape[0], 1, PATIENTS)), IMAGES, axis=2)
    of_labels = PATIENT_LABELS * np.repeat(rng.normal(size=(*shape, PATIENTS)), IMAGES, axis=2)
    scores = common + signal * labels + of_seed + of_labels + RUN * rng.normal(size=(*shape, n))
    return np.stack([-scores, scores], axis=-1)


def true_area(setting: Setting) -> float:
    """Expected AUC of a new run on a pair of new patients: the chance that a normal difference is above 0."""
    variance = 2 * (PATIENT**2 + IMAGE**2 + PATIENT_SEED**2 + PATIENT_LABELS**2 + RUN**2)
    return float(norm.cdf(SIGNAL / np.sqrt(variance + setting.of_seed**2 + setting.of_labels**2)))


def measure(setting: Setting, *, trials: int, draws: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Coverage and mean width by what is estimated ("AUC", "difference") and by what is redrawn."""
    groups = np.repeat(np.arange(PATIENTS), IMAGES)
    labels = np.repeat([0, 1], PATIENTS // 2)[groups]
    found: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for trial in range(trials):
        rng = np.random.default_rng([trial, setting.seeds, setting.draws])
        common = PATIENT * rng.normal(size=PATIENTS)[groups] + IMAGE * rng.normal(size=len(labels))
        both = [predictions(rng, setting, common, labels) for _ in range(2)]
        by_patient = [replicates(one, labels, groups, "auc", draws=draws, seed=trial) for one in both]
        by_image = [replicates(one, labels, None, "auc", draws=draws, seed=trial) for one in both]
        samples = {
            ("AUC", WAYS[0]): alone(by_image[0]),
            ("AUC", WAYS[1]): alone(by_patient[0]),
            ("AUC", WAYS[2]): by_patient[0].samples,
            ("difference", WAYS[0]): alone(by_image[0]) - alone(by_image[1]),
            ("difference", WAYS[1]): alone(by_patient[0]) - alone(by_patient[1]),
            ("difference", WAYS[2]): paired(*by_patient).samples,
        }
        for key, values in samples.items():
            low, high = np.percentile(values, PERCENTILES)
            truth = true_area(setting) if key[0] == "AUC" else 0.0
            found.setdefault(key, []).append((bool(low <= truth <= high), float(high - low)))
    return {key: tuple(np.mean(pairs, axis=0).tolist()) for key, pairs in found.items()}


def alone(found: Replicates) -> np.ndarray:
    """Replicates in which all runs stay as they are."""
    return found.by_run.mean(axis=(1, 2))


def main(args: CoverageArgs) -> int:
    """Measure every setting, print the table and write it."""
    header = ("seeds", "label draws", "sd of seeds", "sd of labels", "estimate", *WAYS)
    lines = ["| " + " | ".join(header) + " |", "|" + " ---: |" * len(header)]
    for setting in SETTINGS:
        found = measure(setting, trials=args.trials, draws=args.replicates)
        for estimate in ("AUC", "difference"):
            cells = [f"{found[estimate, way][0]:.3f} ({found[estimate, way][1]:.3f})" for way in WAYS]
            known = (setting.seeds, setting.draws, setting.of_seed, setting.of_labels)
            lines.append("| " + " | ".join((*map(str, known), estimate, *cells)) + " |")
            print(lines[-1], flush=True)
    error = np.sqrt(0.95 * 0.05 / args.trials)
    text = (
        "# How often 95 % intervals hold the truth\n\n"
        f"Written by `python -m bench.coverage`: {args.trials} simulated studies a setting, {PATIENTS} test patients "
        f"of {IMAGES} images, {args.replicates} replicates an interval. The cells give the share of intervals that "
        f"hold the truth (0.95 is asked for; the share's standard error is then {error:.3f}) and their mean width. The "
        "columns say what is redrawn; the last is `fastmoco.evaluate.intervals`. Seeds and labels move the signal, "
        f"{SIGNAL}, by the standard deviations given (0.1 of signal is 0.015 of AUC). The two methods of a difference "
        "are equally good, and their seeds have nothing in common.\n\n"
    )
    write_text(args.out, text + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    start(main, CoverageArgs, "coverage")
