"""Which images are of one patient."""

from __future__ import annotations

import numpy as np


def patient_groups(patients: np.ndarray | None, count: int) -> np.ndarray:
    """(count,) int64 numbers that are equal for images of one patient; an unnamed patient has one image."""
    if patients is None:
        return np.arange(count)
    groups = np.unique(patients, return_inverse=True)[1].astype(np.int64)
    unnamed = np.flatnonzero(patients == "")
    groups[unnamed] = len(patients) + np.arange(len(unnamed))
    return groups
