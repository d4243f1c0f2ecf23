"""The protocol: settings are chosen on validation images, and test images are scored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.patients import patient_groups
from fastmoco.evaluate.knn import NEIGHBOURS, knn_probabilities
from fastmoco.evaluate.probe import choose_c, probe_probabilities
from fastmoco.evaluate.report import Method, Result, Row
from fastmoco.evaluate.scores import DRAWS, Scores, auc, score
from fastmoco.evaluate.splits import Splits, make_splits

_NOT_FINITE = "undefined: the features hold NaN or infinite values"


def evaluate_features(
    features: Mapping[str, Mapping[str, np.ndarray]],
    manifest: Manifest,
    *,
    label: str,
    seed: int = 0,
    allow_leaks: bool = False,
    context: tuple[str, ...] = (),
) -> Result:
    """Test scores of (n, d) feature sets, by encoder and name, for one label column of the n images.

    Test labels are used for scoring only: C and the feature set are chosen by validation AUC. `seed` fixes
    the drawn splits and the intervals. `context` holds sentences on where the features come from, for the
    report. Raises UserError as `make_splits` does.
    """
    splits = make_splits(manifest, label, seed=seed, allow_leaks=allow_leaks)
    labels, names = manifest.labels[label], manifest.class_names[label]
    groups = patient_groups(manifest.patients, len(manifest))
    rows: list[Row] = []
    for encoder, sets in features.items():
        found = []
        for name, values in sets.items():
            for fit in _fits(values, labels, splits, len(names)):
                scores = Scores.undefined(_NOT_FINITE)
                if fit.probabilities is not None:
                    scores = score(
                        fit.probabilities,
                        labels[splits.test],
                        class_names=names,
                        groups=groups[splits.test],
                        seed=seed,
                    )
                found.append(
                    Row(
                        encoder=encoder,
                        features=name,
                        width=values.shape[1],
                        method=fit.method,
                        c=fit.c,
                        validation_auc=fit.validation_auc,
                        chosen=False,
                        test=replace(scores, notes=scores.notes + fit.notes),
                    )
                )
        rows += _mark_chosen(found)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    patients = {name: len(np.unique(groups[part])) for name, part in parts.items()}
    test_counts = np.bincount(labels[splits.test], minlength=len(names)).tolist()
    return Result(
        label=label,
        images={name: len(part) for name, part in parts.items()},
        patients=None if manifest.patients is None else patients,
        test_classes=dict(zip(names, test_counts, strict=True)),
        origin=splits.origin,
        seed=seed,
        neighbours=NEIGHBOURS,
        draws=DRAWS,
        left_out=len(manifest.skipped),
        context=context,
        rows=tuple(rows),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """A classifier whose settings are chosen, and what it predicts for the test images (None: undefined)."""

    method: Method
    c: float | None = None
    validation_auc: float | None = None
    probabilities: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def _fits(features: np.ndarray, labels: np.ndarray, splits: Splits, classes: int) -> list[_Fit]:
    if not np.isfinite(features).all():
        return [_Fit(method="knn"), _Fit(method="probe")]
    train, validation, test = features[splits.train], features[splits.validation], features[splits.test]
    # The test labels go no further than here.
    known = labels[splits.train], labels[splits.validation]
    return [_knn(train, validation, test, known, classes), _probe(train, validation, test, known, classes)]


def _knn(
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    classes: int,
) -> _Fit:
    tried = knn_probabilities(train, known[0], validation, classes=classes)
    value, _ = auc(tried, known[1], class_names=[str(c) for c in range(classes)])
    bank, votes = np.concatenate([train, validation]), np.concatenate(known)
    final = knn_probabilities(bank, votes, test, classes=classes)
    return _Fit(method="knn", validation_auc=value, probabilities=final)


def _probe(
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    classes: int,
) -> _Fit:
    choice = choose_c(train, known[0], validation, known[1], classes=classes)
    both, answers = np.concatenate([train, validation]), np.concatenate(known)
    final, notes = probe_probabilities(both, answers, test, c=choice.c, classes=classes)
    return _Fit(
        method="probe",
        c=choice.c,
        validation_auc=choice.validation_auc,
        probabilities=final,
        notes=choice.notes + notes,
    )


def _mark_chosen(rows: list[Row]) -> list[Row]:
    """Mark each method's best validation AUC among one encoder's rows, where there is a choice."""
    if len({row.features for row in rows}) < 2:
        return rows
    best: dict[Method, Row] = {}
    for row in rows:
        if row.validation_auc is not None:
            leader = best.get(row.method)
            if leader is None or row.validation_auc > (leader.validation_auc or 0.0):
                best[row.method] = row
    return [replace(row, chosen=best.get(row.method) is row) for row in rows]
