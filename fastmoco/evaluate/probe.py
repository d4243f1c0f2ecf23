"""Linear probes: logistic regression on frozen features, its one constant chosen on validation images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastmoco.evaluate.scores import auc

C_GRID = tuple(float(c) for c in np.logspace(-4, 2, 7))
# scikit-learn's own tolerance, 1e-4, leaves probabilities off by 0.1 at the large Cs; this one by 0.002.
_TOLERANCE = 1e-6
_MOST_ITERATIONS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The inverse regularisation strength `c` with the best validation AUC, and that AUC."""

    c: float
    validation_auc: float
    notes: tuple[str, ...] = ()


def choose_c(
    train: np.ndarray,
    train_labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    *,
    classes: int,
) -> Choice:
    """Fit (n, d) training features at every C of the grid and keep the C whose AUC on (m, d) others is best.

    Of equal ones the smallest C, the most regularised, is kept. Raises ValueError where the validation labels
    are all of one class.
    """
    scaler = _Scaler(train)
    scaled, other = scaler(train), scaler(validation)
    names = [str(c) for c in range(classes)]
    best: Choice | None = None
    for c in C_GRID:
        model, notes = _fit(scaled, train_labels, c)
        value, reasons = auc(_probabilities(model, other, classes), validation_labels, class_names=names)
        if value is None:
            raise ValueError(f"no C can be chosen: {reasons[0]}")
        if best is None or value > best.validation_auc:
            best = Choice(c=c, validation_auc=value, notes=notes)
    assert best is not None
    return best


def probe_probabilities(
    train: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, c: float, classes: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class probabilities (m, classes) float64 of (m, d) queries by a probe fitted on (n, d) training
    features.

    A class that is absent from `labels` (n,) has probability 0. The second value says if the fit fell short.
    """
    scaler = _Scaler(train)
    model, notes = _fit(scaler(train), labels, c)
    return _probabilities(model, scaler(queries), classes), notes


class _Scaler:
    """Mean 0 and variance 1 over the training features; a constant feature becomes 0 everywhere."""

    def __init__(self, train: np.ndarray) -> None:
        wide = train.astype(np.float64)
        self.mean = wide.mean(axis=0)
        deviation = wide.std(axis=0)
        # A constant column's deviation is rounding noise of its mean, and the features' own precision is
        # float32.
        constant = deviation <= np.finfo(np.float32).eps * np.abs(self.mean)
        self.factor = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=~constant & (deviation > 0))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features.astype(np.float64) - self.mean) * self.factor


def _fit(features: np.ndarray, labels: np.ndarray, c: float) -> tuple[LogisticRegression, tuple[str, ...]]:
    """The fitted model, and what there is to say if the solver did not converge."""
    model = LogisticRegression(C=c, solver="lbfgs", tol=_TOLERANCE, max_iter=_MOST_ITERATIONS)
    # The matrices are small: threads would spend their time waiting for each other, minutes on a busy machine.
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1):
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    notes: tuple[str, ...] = ()
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            iterations = int(np.max(model.n_iter_))
            notes = (f"the probe at C {c:g} stopped after {iterations} iterations without converging",)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model, notes


def _probabilities(model: LogisticRegression, features: np.ndarray, classes: int) -> np.ndarray:
    result = np.zeros((len(features), classes))
    result[:, model.classes_] = model.predict_proba(features)
    return result
