"""Arrays as they stand in the cells' files."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_DIGITS = 6


def pack(probabilities: np.ndarray) -> list[Any]:
    """(n, C) probabilities as lists, to 6 digits; of two classes whose probabilities sum to 1, class 1's alone."""
    rounded = np.round(probabilities.astype(np.float64), _DIGITS)
    two = rounded.shape[1] == 2 and np.allclose(rounded.sum(axis=1), 1.0, atol=1e-5)
    packed: list[Any] = (rounded[:, 1] if two else rounded).tolist()
    return packed


def unpack(packed: list[Any]) -> np.ndarray:
    """What `pack` packed, (n, C) float64."""
    values = np.asarray(packed, dtype=np.float64)
    return np.stack([1.0 - values, values], axis=1) if values.ndim == 1 else values


def finite(value: float | None) -> float | None:
    """`value`, or None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else float(value)
