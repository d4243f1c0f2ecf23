"""Draws: pure functions of (seed, epoch, sample, view), with torchvision's distributions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F

from fastmoco.data.draws import draw
from fastmoco.data.views import ViewConfig, centre_windows, resized_sizes
from fastmoco.errors import UserError
from fastmoco.ops.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION

VIEWS = ViewConfig(size=64, crop_scale=(0.2, 1.0), rotation=30.0, flip_p=0.5)
N = 20000


def drawn(
    views: ViewConfig = VIEWS, *, seed: int = 3, epoch: int = 1, view: int = 0, indices: Any = None, turns: Any = 0
) -> np.ndarray:
    chosen = np.arange(N) if indices is None else np.asarray(indices)
    sizes = np.stack([8 + chosen * 7 % 93, 50 + chosen * 11 % 61], axis=1)
    return draw(views, seed=seed, epoch=epoch, indices=chosen, view=view, sizes=sizes, turns=turns)


def test_a_draw_does_not_depend_on_its_batch() -> None:
    together = drawn(indices=[5, 1, 900, 3, 1])
    assert together["image"].tolist() == [0, 1, 2, 3, 4]
    for place, index in enumerate([5, 1, 900, 3, 1]):
        alone = drawn(indices=[index])
        alone["image"] = place
        assert together[place] == alone[0]


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"epoch": 2}, {"view": 1}, {"turns": 1}, {"turns": 2**40}, {"indices": np.arange(50) + 1}]
)
def test_seed_epoch_view_and_sample_each_change_the_draws(other: dict[str, Any]) -> None:
    indices = np.arange(50)
    first, second = drawn(indices=indices), drawn(**{"indices": indices, **other})
    assert (first["angle"] != second["angle"]).all()
    # Very flat images have only one window to draw.
    assert (first["window"] != second["window"]).any(axis=1).mean() > 0.75


def test_switching_transforms_off_leaves_the_other_draws_alone() -> None:
    bare = ViewConfig(size=64, resize=1.0, jitter_p=0.0, gray_p=0.0, rotation=30.0)
    full, less = drawn(indices=np.arange(100)), drawn(bare, indices=np.arange(100))
    np.testing.assert_array_equal(full["sigma"], less["sigma"])
    np.testing.assert_array_equal(full["angle"], less["angle"])
    assert not less["gray"].any() and not less["flip"].any() and not less["factor"][:, HUE].any()
    assert (less["factor"] == NEUTRAL).all()


def test_probabilities_and_ranges() -> None:
    draws = drawn()
    assert VIEWS.jitter_p == 0.8
    for happened, p in (
        (draws["factor"][:, HUE] != 0, 0.8),
        (draws["factor"][:, BRIGHTNESS] != 1, 0.8),
        (draws["gray"], 0.2),
        (draws["sigma"] > 0, 0.5),
        (draws["flip"], 0.5),
    ):
        assert abs(happened.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / N)
    # The four factors are switched together.
    np.testing.assert_array_equal(draws["factor"][:, HUE] != 0, draws["factor"][:, SATURATION] != 1)
    for values, low, high in (
        (draws["factor"][:, BRIGHTNESS][draws["factor"][:, BRIGHTNESS] != 1], 0.6, 1.4),
        (draws["factor"][:, CONTRAST][draws["factor"][:, CONTRAST] != 1], 0.6, 1.4),
        (draws["factor"][:, SATURATION][draws["factor"][:, SATURATION] != 1], 0.6, 1.4),
        (draws["factor"][:, HUE][draws["factor"][:, HUE] != 0], -0.1, 0.1),
        (draws["sigma"][draws["sigma"] > 0], 0.1, 2.0),
        (draws["angle"], -30.0, 30.0),
    ):
        assert low <= values.min() and values.max() <= high
        # Uniform: each tenth of the range holds a tenth of the draws.
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        p = len(values) / 10
        assert ((counts - p) ** 2 / p).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4


def test_a_strong_jitter_never_draws_a_negative_factor() -> None:
    draws = drawn(replace(VIEWS, jitter=(1.8, 1.8, 1.8, 0.5)))
    assert draws["factor"][:, :HUE].min() >= 0
    assert draws["factor"][:, BRIGHTNESS].max() > 2.5


def test_colour_operations_come_in_every_order_equally_often() -> None:
    orders, counts = np.unique(drawn()["order"], axis=0, return_counts=True)
    assert [tuple(order) for order in orders.tolist()] == list(itertools.permutations(range(4)))
    expected = N / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60.0  # chi-square, 23 degrees of freedom, p = 4e-5


def test_draws_are_independent_of_each_other() -> None:
    draws = drawn(replace(VIEWS, jitter_p=1.0, blur_p=1.0))
    other = drawn(replace(VIEWS, jitter_p=1.0, blur_p=1.0), view=1)
    columns = [
        *(*draws["factor"].T, draws["gray"], draws["sigma"], draws["angle"]),
        *(draws["flip"], draws["order"][:, CONTRAST], draws["order"][:, HUE], draws["window"][:, 2]),
        *(other["angle"], other["sigma"]),
    ]
    correlation = np.corrcoef(np.stack(columns).astype(float))
    # The two places of a permutation are anticorrelated by nature.
    correlation[8, 9] = correlation[9, 8] = 0
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(N)


def scalar_window(u: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.make_params, number by number, on given uniforms."""
    for area_u, ratio_u, top_u, left_u in u:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio_u)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
    ratio = width / height
    h, w = height, width
    if ratio < 3 / 4:
        h = round(w / (3 / 4))
    elif ratio > 4 / 3:
        w = round(h * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def test_windows_are_torchvisions_and_lie_inside_even_very_flat_images() -> None:
    sizes = np.array([(8, 50), (50, 8), (1, 40), (50, 50), (97, 131), (512, 300)] * 150)
    indices = np.arange(len(sizes)) * 3
    draws = draw(VIEWS, seed=9, epoch=7, indices=indices, view=1, sizes=sizes)
    fallbacks = 0
    for (height, width), index, window in zip(sizes.tolist(), indices.tolist(), draws["window"].tolist(), strict=True):
        # The stream itself is part of the contract: a run must go on with the same views in a later version.
        stream = np.random.Philox(key=[9, 0], counter=[0, 1, index, 7]).random_raw(40)
        u = (stream >> np.uint64(11)).astype(float) * 2.0**-53
        assert tuple(window) == scalar_window(u.reshape(10, 4), height, width, (0.2, 1.0))
        top, left, h, w = window
        assert top >= 0 and left >= 0 and h > 0 and w > 0 and top + h <= height and left + w <= width
        fallbacks += (height, width) == (1, 40) and (h, w) == (1, 1)
    assert fallbacks > 0


def test_crop_after_a_first_resize_stays_in_the_central_square() -> None:
    views = ViewConfig(size=63, resize=256 / 255, crop_scale=(0.4, 1.0))
    sizes = np.array([(8, 50), (50, 8), (50, 50), (97, 131)] * 100)
    draws = draw(views, seed=0, epoch=0, indices=np.arange(400), view=0, sizes=sizes)
    square = centre_windows(views, draws["resized"])
    assert (draws["window"][:, :2] >= square[:, :2]).all()
    assert (draws["window"][:, :2] + draws["window"][:, 2:] <= square[:, :2] + 63).all()


@pytest.mark.parametrize("height,width", [(50, 50), (8, 50), (51, 8), (97, 131), (300, 211), (65, 64)])
@pytest.mark.parametrize("size,resize", [(64, 1.0), (63, 256 / 255), (33, 1.3)])
def test_geometry_is_torchvisions(height: int, width: int, size: int, resize: float) -> None:
    views = ViewConfig(size=size, resize=resize)
    resized = resized_sizes(views, np.array([[height, width]], dtype=np.int32))
    assert resized is not None
    image = F.resize(torch.zeros(1, height, width), [round(resize * size)], antialias=True)
    assert tuple(resized[0]) == tuple(image.shape[1:])
    numbered = torch.arange(image.numel()).reshape(image.shape)
    top, left, h, w = centre_windows(views, resized)[0]
    assert torch.equal(numbered[:, top : top + h, left : left + w], F.center_crop(numbered, [size, size]))


def test_blur_kernels_of_the_paper_sizes() -> None:
    assert [ViewConfig(size=size, resize=1.0).blur_kernel for size in (224, 64, 512, 19)] == [23, 7, 51, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 4},
        {"resize": None},
        {"resize": 0.9},
        {"resize": float("nan")},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.8, 0.4)},
        {"crop_scale": (0.5, 1.1)},
        {"jitter": (0.4, -0.1, 0.4, 0.1)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter_p": 1.2},
        {"gray_p": -0.1},
        {"blur_p": float("nan")},
        {"flip_p": 2.0},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"rotation": -1.0},
        {"rotation": 181.0},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
        ViewConfig(**{"size": 64, "resize": 1.0, **bad})
