"""Arrays as they stand in the cells' files."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from fastmoco.evaluate.targets import Kind

_DIGITS = 6
# The logarithm of the least number above 0 that float64 has: what stands for that of 0, since JSON has no infinity.
_LEAST = math.log(5e-324)
_ODDS, _LOGS = "log_odds", "log_probabilities"


def pack(probabilities: np.ndarray, kind: Kind) -> dict[str, Any]:
    """(n, C) probabilities of a target of `kind` as logarithms, to 6 significant digits, in lists.

    {"log_odds"}: of two classes those of class 1, n numbers; of several labels one list an image. {"log_probabilities"}
    of several classes: one list an image. Probabilities near 0 and 1, of which a fine-tuned network has many, keep
    their order so; digits after the decimal point would make them equal, and an AUC of them another.
    """
    wide = probabilities.astype(np.float64)
    if kind == "multiclass":
        return {_LOGS: _rounded(_log(wide))}
    # Of a softmax the smaller of the two is exact where the other is rounded to 1.
    odds = _log(wide) - _log(1.0 - wide) if kind == "multilabel" else _log(wide[:, 1]) - _log(wide[:, 0])
    return {_ODDS: _rounded(odds)}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """What `pack` packed, (n, C) float64; of two classes, and of several, those of an image sum to 1."""
    if _LOGS in packed:
        found: np.ndarray = softmax(np.asarray(packed[_LOGS], dtype=np.float64), axis=1)
        return found
    odds = np.asarray(packed[_ODDS], dtype=np.float64)
    return np.stack([expit(-odds), expit(odds)], axis=1) if odds.ndim == 1 else expit(odds)


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(values), _LEAST)


def _rounded(values: np.ndarray) -> list[Any]:
    if values.ndim == 2:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
