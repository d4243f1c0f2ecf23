"""Measures of a representation that need no labels, and one that needs them without training anything.

RankMe, effective rank, alignment and uniformity, and TMI. Each is its paper's definition, on (n, d) features of n
images in float64. NaN stands where features are not finite or a measure is not defined. None of them says by itself
that a representation is good: they are for comparing encoders of one width on the same images.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import digamma

RANKME_EPSILON = 1e-7
TMI_NEIGHBOURS = 3
# Rows whose distances to all others are held at a time.
_BLOCK = 1024


def rankme(features: np.ndarray, *, epsilon: float = RANKME_EPSILON) -> float:
    """Smooth rank of (n, d) features, between 1 and about min(n, d).

    RankMe (Garrido, Balestriero, Najman and LeCun, ICML 2023): exp(-sum p_k log p_k), p_k = s_k / |s|_1 +
    epsilon with the singular values s of the features as they are, not centred. All-zero features are NaN.
    """
    if not np.isfinite(features).all():
        return float("nan")
    shares = _shares(features.astype(np.float64))
    p = shares + epsilon
    return float(np.exp(-np.sum(p * np.log(p))))


def effective_rank(features: np.ndarray) -> float:
    """Effective rank of (n, d) features around their mean, between 1 and min(n - 1, d).

    Roy and Vetterli (EUSIPCO 2007): exp of the entropy of s_k / |s|_1, with the singular values s. They define it for a
    matrix; here that is the centred features, so that, unlike RankMe, a mean that all images share does not
    count. Constant features are NaN.
    """
    if not np.isfinite(features).all():
        return float("nan")
    wide = features.astype(np.float64)
    shares = _shares(wide - wide.mean(axis=0))
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else float("nan")


def alignment(first: np.ndarray, second: np.ndarray, *, alpha: float = 2.0) -> float:
    """Mean distance to the power `alpha` of two views of each of n images; (n, d) each, rows scaled to length 1.

    Wang and Isola (ICML 2020, section 4.1). 0: views coincide; at alpha 2 unrelated ones have 2, opposite ones 4.
    Raises ValueError where the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"two views of the same images have one shape, not {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    apart = np.linalg.norm(_directions(first) - _directions(second), axis=1)
    return float(np.mean(apart**alpha))


def uniformity(features: np.ndarray, *, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of two of n images; (n, d), rows scaled to length 1.

    Wang and Isola (ICML 2020, section 4.1). 0: all in one place; lower is more even, and at t 2 an even spread over a
    sphere of many dimensions has -4. NaN for fewer than 2 images.
    """
    if len(features) < 2 or not np.isfinite(features).all():
        return float("nan")
    rows = _directions(features)
    squares = np.square(rows).sum(axis=1)
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        apart = squares[part, None] + squares[None, start:] - 2.0 * rows[part] @ rows[start:].T
        # Above the diagonal: each pair once.
        total += float(np.triu(np.exp(-t * np.maximum(apart, 0.0)), 1).sum())
    return float(np.log(total / (len(rows) * (len(rows) - 1) / 2)))


def tmi(features: np.ndarray, labels: np.ndarray, *, neighbours: int = TMI_NEIGHBOURS) -> float:
    """TMI, the variance within classes as an entropy in nats: H(Z | Y) of (n, d) features Z and (n,) classes Y.

    Xu and Kang (ICCV 2023) hold an encoder with a higher value to transfer better. H(Z | Y) = sum over classes of
    p(y) H(Z | y), each entropy by the nearest-neighbour estimator of Kozachenko and Leonenko in the maximum norm,
    H = psi(n_y) - psi(k) + d mean log(2 r), with r the distance to the k-th neighbour in the class (Kraskov,
    Stoegbauer and Grassberger, Physical Review E 69, 2004); k = 3 is the authors'. It is an entropy of the features
    as they are: a times them is d log a more, so that only features of one width and like scale compare.

    Two steps of their published code are left out: it raises distances below 1 to 1 (against distances of 0), which
    leaves nothing to measure where features are small, such as those of a ResNet-18 on 64-pixel patches, of which it
    raised every one; and it divides by the number of classes, which changes no order.

    A class of `neighbours` images or fewer has no estimate and is left out, p(y) over the others; NaN if all are, and
    -inf where an image and its `neighbours` nearest coincide. Raises ValueError where features and labels differ in
    number.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} rows of features for {len(labels)} labels")
    if not np.isfinite(features).all():
        return float("nan")
    wide = features.astype(np.float64)
    total, images = 0.0, 0
    for label in np.unique(labels):
        own = wide[labels == label]
        if len(own) <= neighbours:
            continue
        # The nearest of all is the image itself.
        reach = cKDTree(own).query(own, k=[neighbours + 1], p=np.inf)[0][:, 0]
        with np.errstate(divide="ignore"):
            logs = np.log(2.0 * reach)
        total += len(own) * (digamma(len(own)) - digamma(neighbours) + own.shape[1] * np.mean(logs))
        images += len(own)
    return float(total / images) if images else float("nan")


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Singular values divided by their sum; NaN where that is 0."""
    values = np.linalg.svd(matrix, compute_uv=False)
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, np.nan)


def _directions(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float64; a zero row stays at the origin."""
    wide = features.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
