"""Centred kernel alignment: how alike two representations of the same images are, 1 for the same and 0 for unrelated.

CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of two Gram matrices (Kornblith et al., ICML 2019). Estimators:

`biased`      HSIC(K, L) = tr(K H L H) / (n - 1)^2 with the centring matrix H (Gretton et al., ALT 2005), as Kornblith
              et al. and Kaku et al. use. Where n is not far above the features' width it is near 1 for anything.
`unbiased`    HSIC_1 of Song et al. (JMLR 13, 2012). It is the inner product of the two U-centred matrices
              (Szekely and Rizzo, Annals of Statistics 42, 2014), so that this CKA lies in [-1, 1].
`minibatch`   numerator and denominators are averages of HSIC_1 over minibatches (Nguyen, Raghu and Kornblith, ICLR
              2021). No matrix of all images by all images is ever formed.

Kernels: `linear` is x'y. `rbf` is exp(-|x - y|^2 / (2 s^2)), where s is `sigma` times the median distance between
two images' features, over all images given. `paper` is the same with s = 0.8 whatever the features: the absolute value
in the code published with Kaku et al. (NeurIPS 2021). In hundreds of dimensions its matrix is all but the identity.

All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial.distance import pdist

from fastmoco.evaluate.numbers import finite

Kernel = Literal["linear", "rbf", "paper"]
Estimator = Literal["biased", "unbiased", "minibatch"]

PAPER_SIGMA = 0.8
BATCH = 256
# Images up to which all pairs are compared: eight Gram matrices of so many take 256 MiB.
WHOLE = 2048
# Where no more than this share of the images is drawn, one draw still differs from the next.
SHARE = 0.8
# Images whose distances give the median.
_MEDIAN_OF = 2000
# Centring a matrix that does not vary leaves rounding, of this size relative to its elements.
_ROUNDING = 64 * np.finfo(np.float64).eps


class Alignments(NamedTuple):
    """CKA of every pair of feature sets: `values` (rows, columns) float64, NaN where one set does not vary."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """CKA of one stage before and after, over `draws` draws of `size` of the `images` images, without replacement.

    `std` (n - 1 in its denominator) says how much the draw matters. Draws share images, so that it is neither a
    standard error nor to be divided by the square root of `draws`.
    """

    mean: float
    std: float
    draws: int
    size: int
    images: int

    def as_json(self) -> dict[str, float | int | None]:
        """All of it by name, as JSON has it: None for what is undefined."""
        return asdict(self) | {"mean": finite(self.mean), "std": finite(self.std)}


def unbiased_for(images: int) -> Estimator:
    """The unbiased estimator for so many images: of all of them up to `WHOLE`, of minibatches above."""
    return "unbiased" if images <= WHOLE else "minibatch"


def kernel_words(kernel: Kernel, sigma: float = 1.0) -> str:
    """What `kernel` is called wherever it is shown; `sigma` is in medians and belongs to `rbf`."""
    if kernel == "linear":
        return "linear"
    if kernel == "paper":
        return f"RBF, absolute {PAPER_SIGMA}"
    return f"RBF, {'' if sigma == 1 else f'{sigma:g} x '}median distance"


def cka(
    a: np.ndarray,
    b: np.ndarray,
    *,
    kernel: Kernel = "linear",
    sigma: float = 1.0,
    estimator: Estimator = "biased",
    batch: int = BATCH,
    passes: int = 1,
    seed: int = 0,
) -> float:
    """CKA of (n, d1) and (n, d2) features of the same n images; NaN where one does not vary or is not finite.

    See `cka_matrix` for the options.
    """
    found = cka_matrix(
        {"": a}, {"": b}, kernel=kernel, sigma=sigma, estimator=estimator, batch=batch, passes=passes, seed=seed
    )
    return float(found.values[0, 0])


def cka_matrix(
    features_a: Mapping[str, np.ndarray],
    features_b: Mapping[str, np.ndarray],
    *,
    kernel: Kernel = "linear",
    sigma: float = 1.0,
    estimator: Estimator = "biased",
    batch: int = BATCH,
    passes: int = 1,
    seed: int = 0,
) -> Alignments:
    """CKA of each (n, d) set of `features_a` with each of `features_b`, by name, all of the same n images.

    `sigma` is in medians and belongs to `rbf`. `batch` and `passes` belong to `minibatch`: in each pass, all images
    are shuffled by `seed` and split into n // batch parts, as even as can be. Raises ValueError where the sets do not
    hold the same number of images, or fewer than an estimator needs (2, or 4 where unbiased).
    """
    count = _same_count([*features_a.values(), *features_b.values()], least=2 if estimator == "biased" else 4)
    if estimator == "minibatch" and batch < 4:
        raise ValueError(f"a minibatch of {batch} images has no unbiased HSIC: it takes 4")
    batches = _shuffled(count, batch, passes, seed) if estimator == "minibatch" else [np.arange(count)]
    rows = [_Grams(values, kernel, sigma) for values in features_a.values()]
    columns = [_Grams(values, kernel, sigma) for values in features_b.values()]
    values = _alignments(rows, columns, batches, unbiased=estimator != "biased")
    return Alignments(tuple(features_a), tuple(features_b), values)


def feature_reuse(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    *,
    draws: int = 50,
    size: int = 1000,
    seed: int = 0,
    kernel: Kernel = "linear",
    sigma: float = 1.0,
    estimator: Literal["biased", "unbiased"] = "unbiased",
) -> dict[str, Reuse]:
    """How much of each stage fine-tuning kept: CKA before against after, mean and deviation over draws of images.

    `before` and `after` hold (n, d) features of the same n test images by stage; stages that both have are compared.
    A draw takes `size` images without replacement (Kaku et al.: 50 draws of 1,000, and the biased estimator), or 80 %
    of the images where that is fewer, since draws of all images would be one and the same. Raises ValueError as
    `cka_matrix` does, and with fewer than 2 draws.
    """
    if draws < 2:
        raise ValueError(f"{draws} draws have no standard deviation")
    shared = [name for name in before if name in after]
    count = _same_count([found[name] for name in shared for found in (before, after)], least=5)
    taken = max(4, min(size, round(SHARE * count)))
    rng = np.random.default_rng(seed)
    rows = [rng.choice(count, taken, replace=False) for _ in range(draws)]
    reuse = {}
    for name in shared:
        pair = [_Grams(before[name], kernel, sigma)], [_Grams(after[name], kernel, sigma)]
        values = [_alignments(*pair, [drawn], unbiased=estimator == "unbiased")[0, 0] for drawn in rows]
        reuse[name] = Reuse(
            mean=float(np.mean(values)), std=float(np.std(values, ddof=1)), draws=draws, size=taken, images=count
        )
    return reuse


class _Grams:
    """Gram matrices of parts of one (n, d) set; the kernel's width is that of the whole set."""

    def __init__(self, features: np.ndarray, kernel: Kernel, sigma: float) -> None:
        # Neither kernel's centred matrix depends on the mean, and distances lose fewer digits without it.
        wide = features.astype(np.float64)
        self.features = wide - wide.mean(axis=0) if np.isfinite(wide).all() else np.full_like(wide, np.nan)
        self.width: float | None = None
        if kernel == "paper":
            self.width = PAPER_SIGMA
        elif kernel == "rbf":
            self.width = sigma * _median_distance(self.features)
        elif kernel != "linear":
            raise ValueError(f"no kernel {kernel!r}: linear, rbf or paper")
        self.whole = self._gram(self.features) if len(features) <= WHOLE else None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(m, m): the Gram matrix of the images `rows` (m,)."""
        if self.whole is None:
            return self._gram(self.features[rows])
        return self.whole[np.ix_(rows, rows)]  # a copy

    def _gram(self, features: np.ndarray) -> np.ndarray:
        products = features @ features.T
        if self.width is None:
            return products
        own = np.diagonal(products)
        squares = np.maximum(own[:, None] + own[None, :] - 2.0 * products, 0.0)
        np.fill_diagonal(squares, 0.0)
        # A width of 0, where most images have the same features, leaves no kernel: NaN.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.exp(-squares / (2.0 * self.width**2))


def _alignments(
    rows: list[_Grams], columns: list[_Grams], batches: Iterable[np.ndarray], *, unbiased: bool
) -> np.ndarray:
    """(rows, columns) CKA, numerators and denominators averaged over the batches of images."""
    cross = np.zeros((len(rows), len(columns)))
    own_rows, own_columns = np.zeros(len(rows)), np.zeros(len(columns))
    for images in batches:
        n = len(images)
        scale = n * (n - 3) if unbiased else (n - 1) ** 2
        first = np.stack([_centred(grams(images), unbiased) for grams in rows])
        second = np.stack([_centred(grams(images), unbiased) for grams in columns])
        cross += first @ second.T / scale
        own_rows += np.square(first).sum(axis=1) / scale
        own_columns += np.square(second).sum(axis=1) / scale
    size = np.sqrt(own_rows)[:, None] * np.sqrt(own_columns)[None, :]
    return np.divide(cross, size, out=np.full_like(cross, np.nan), where=size > 0)


def _centred(gram: np.ndarray, unbiased: bool) -> np.ndarray:
    """(n * n,): H K H, or the U-centred K. The inner product of two is that estimator's HSIC, times a scale."""
    n = len(gram)
    if unbiased:
        np.fill_diagonal(gram, 0.0)
        means = gram.sum(axis=0) / (n - 2)
        centred = gram - means[:, None] - means[None, :] + means.sum() / (n - 1)
        np.fill_diagonal(centred, 0.0)
    else:
        means = gram.mean(axis=0)
        centred = gram - means[:, None] - means[None, :] + means.mean()
    if np.linalg.norm(centred) <= _ROUNDING * np.linalg.norm(gram):
        centred[:] = 0.0
    return centred.ravel()


def _median_distance(features: np.ndarray) -> float:
    """Median Euclidean distance of two different rows; of evenly spaced rows where there are many."""
    step = -(-len(features) // _MEDIAN_OF)
    return float(np.median(pdist(features[::step])))


def _shuffled(count: int, batch: int, passes: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = max(1, count // batch)
    return [part for _ in range(passes) for part in np.array_split(rng.permutation(count), parts)]


def _same_count(sets: list[np.ndarray], *, least: int) -> int:
    counts = {len(features) for features in sets}
    if len(counts) != 1:
        raise ValueError(f"CKA compares features of the same images, not of {sorted(counts)} images")
    count = counts.pop()
    if count < least:
        raise ValueError(f"{count} images are too few for this CKA: it takes {least}")
    return count
