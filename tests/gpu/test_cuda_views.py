"""Views on a GPU against torchvision's on the CPU, without waiting, the same every time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_checks import DEVICE, assert_same_bits, no_synchronisation
from fastmoco.ops.views import NEUTRAL, VIEW, make_views

pytestmark = pytest.mark.gpu
OPERATION = "views"

SHAPES = [(1, 1), (1, 7), (8, 50), (97, 131), (640, 480)]


def pictures() -> list[np.ndarray]:
    """Grain, 8 and 16 bits in turn."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 65536, (*shape, 3), dtype=np.uint16) if i % 2 else rng.integers(0, 256, (*shape, 3), np.uint8)
        for i, shape in enumerate(SHAPES)
    ]


def records(count: int) -> np.ndarray:
    """Views of the pictures in turn, each operation on in some of them."""
    rng = np.random.default_rng(1)
    views = np.zeros(count, dtype=VIEW)
    views["image"] = np.arange(count) % len(SHAPES)
    bounds = np.array(SHAPES)[views["image"]]
    resized = rng.random(count) < 0.5
    views["resized"][resized] = bounds[resized] = rng.integers(1, 300, (count, 2))[resized]
    views["window"][:, 2:] = rng.integers(1, bounds + 1)
    views["window"][:, :2] = rng.integers(0, bounds - views["window"][:, 2:] + 1)
    views["order"] = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    factors = np.concatenate([rng.uniform(0, 2, (count, 3)), rng.uniform(-0.5, 0.5, (count, 1))], axis=1)
    views["factor"] = np.where(rng.random((count, 4)) < 0.5, factors, NEUTRAL)
    views["sigma"] = np.where(rng.random(count) < 0.5, rng.uniform(0.1, 2, count), 0)
    views["angle"] = np.where(rng.random(count) < 0.5, rng.uniform(-180, 180, count), 0)
    views["gray"], views["flip"] = rng.random(count) < 0.2, rng.random(count) < 0.5
    return views


def on_device() -> list[Tensor]:
    return [torch.from_numpy(picture).to(DEVICE) for picture in pictures()]


@pytest.mark.parametrize(("size", "kernel"), [(7, 1), (33, 3), (224, 23)])
def test_it_is_the_definition(implementation: str, size: int, kernel: int) -> None:
    """More views than a group has, at the largest size. A value may round to its neighbour."""
    views = records(60)
    want = make_views(pictures(), views, size=size, blur_kernel=kernel, implementation="reference")
    with torch.backends.cudnn.flags(allow_tf32=False):
        made = make_views(on_device(), views, size=size, blur_kernel=kernel, implementation=implementation)
    assert made.device.type == DEVICE.type and made.shape == (60, size, size, 3) and made.dtype == torch.float16
    error = (made.cpu().float() - want.float()).abs()
    assert error.max() <= 2.0**-11 and error.mean() < 2.0**-17


def test_the_bits_are_the_same_every_time(implementation: str) -> None:
    images, views = on_device(), records(20)
    assert_same_bits(lambda: [make_views(images, views, size=45, blur_kernel=5, implementation=implementation)])


def test_nothing_waits_for_the_device() -> None:
    images, views = on_device(), records(20)
    make_views(images, views, size=45, blur_kernel=5)
    with no_synchronisation():
        make_views(images, views, size=45, blur_kernel=5)
