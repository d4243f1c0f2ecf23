"""The DALI loader's views against torchvision's, fed the same draws: each operation, and the paper's recipes.

Images are PNG, so that both sides decode the same pixels. Run with -rP to see the table of errors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from fastmoco.data.draws import draw
from fastmoco.data.loader import make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig
from fastmoco.ops.views import make_views

# Half a unit in the last place of float16 below 1, twice over, in 255ths.
FP16 = 0.13
SHAPES = [(50, 50), (8, 50), (51, 8), (97, 131), (300, 211), (64, 65), (130, 64)]


def make_images(folder: Path, shapes: list[tuple[int, int]]) -> Manifest:
    """Half of them smooth, as tissue is, with grain; half pure noise, the hardest case for every filter."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i, (height, width) in enumerate(shapes):
        coarse = torch.from_numpy(rng.random((1, 3, 5, 7)))
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
        noise = rng.random((height, width, 3))
        pixels = noise if i % 2 else smooth.numpy() + 0.1 * (noise - 0.5)
        # Gray and saturated pixels have no hue: the branch points of HSV.
        pixels[:3] = pixels[:3, :, :1]
        pixels[3:5] = np.rint(pixels[3:5])
        Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(folder / f"{i}.png")
    return Manifest(root=folder, files=[f"{i}.png" for i in range(len(shapes))], sizes=np.array(shapes, dtype=np.int32))


def differences(manifest: Manifest, views: ViewConfig, batches: int = 4) -> np.ndarray:
    """Absolute differences (views, 3, size, size) between the loaders, in 255ths."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    order = Order(len(manifest), len(manifest), seed=5)
    with (
        make_loader("dali", manifest, views, order, start=0, stop=batches, workers=2) as dali,
        make_loader("torchvision", manifest, views, order, start=0, stop=batches, workers=0) as torchvision,
    ):
        pairs = list(zip(dali, torchvision, strict=True))
    assert len(pairs) == batches
    for ours, reference in pairs:
        np.testing.assert_array_equal(ours.indices, reference.indices)
    errors = [
        (getattr(ours, view).float() - getattr(reference, view).float()).abs() * 255
        for ours, reference in pairs
        for view in "qk"
    ]
    return torch.cat(errors).numpy()


def report(name: str, errors: np.ndarray) -> None:
    print(
        f"{name:24s} mean {errors.mean():.4f}  99 % {np.quantile(errors, 0.99):.3f}  "
        f"99.9 % {np.quantile(errors, 0.999):.3f}  max {errors.max():.3f}  (255ths)"
    )


def only(**on: object) -> ViewConfig:
    """Views of 64 pixels of square 64 pixel images, of which the resize changes nothing, with one transform on."""
    return ViewConfig(**{"size": 64, "resize": 1.0, "jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, **on})  # type: ignore[arg-type]


POINTWISE = {
    "decode": only(),
    "brightness": only(jitter_p=1.0, jitter=(0.8, 0.0, 0.0, 0.0)),
    "contrast": only(jitter_p=1.0, jitter=(0.0, 0.8, 0.0, 0.0)),
    "saturation": only(jitter_p=1.0, jitter=(0.0, 0.0, 0.8, 0.0)),
    "hue 0.1": only(jitter_p=1.0, jitter=(0.0, 0.0, 0.0, 0.1)),
    "hue 0.3": only(jitter_p=1.0, jitter=(0.0, 0.0, 0.0, 0.3)),
    "hue 0.5": only(jitter_p=1.0, jitter=(0.0, 0.0, 0.0, 0.5)),
    "jitter": only(jitter_p=0.8),
    "gray": only(gray_p=0.5),
    "jitter, gray": only(jitter_p=1.0, gray_p=0.5, jitter=(0.8, 0.8, 0.8, 0.5)),
    "blur": only(blur_p=0.5),
    "blur, wide": only(blur_p=1.0, blur_sigma=(0.01, 9.0)),
    "rotation": only(rotation=30.0),
    "rotation 180": only(rotation=180.0),
    "flip": only(flip_p=0.5),
    "all": ViewConfig(size=64, resize=1.0, rotation=30.0, flip_p=0.5),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_each_operation_on_equal_pixels(name: str, tmp_path: Path) -> None:
    errors = differences(make_images(tmp_path, [(64, 64)] * 12), POINTWISE[name])
    report(name, errors)
    assert errors.mean() < 0.01
    # A pixel may round to the other float16 neighbour; nothing else may differ.
    assert errors.max() < 2 * FP16


RESAMPLED = {
    "resize": only(),
    "random crop": only(resize=None, crop_scale=(0.2, 1.0)),
    "resize, random crop": only(size=63, resize=256 / 255, crop_scale=(0.4, 1.0)),
}


@pytest.mark.parametrize("name", RESAMPLED)
def test_each_resampling(name: str, tmp_path: Path) -> None:
    errors = differences(make_images(tmp_path, SHAPES), RESAMPLED[name])
    report(name, errors)
    assert errors.mean() < 0.02
    # Two resizes round twice; borders are no exception.
    assert errors.max() < 2 * FP16


RECIPES = {
    "chest": ViewConfig(size=512, resize=1.0, rotation=30.0),
    "histology": ViewConfig(size=255, resize=256 / 255, crop_scale=(0.4, 1.0), flip_p=0.5),
    "fundus": ViewConfig(size=299, resize=1.0, rotation=30.0, flip_p=0.5),
    "mocov2": ViewConfig(size=224, crop_scale=(0.2, 1.0), flip_p=0.5),
    "small": ViewConfig(size=33, crop_scale=(0.2, 1.0), flip_p=0.5),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.system] if name == "chest" else []) for name in RECIPES]
)
def test_whole_recipes(name: str, tmp_path: Path) -> None:
    errors = differences(make_images(tmp_path, SHAPES), RECIPES[name], batches=1)
    report(name, errors)
    assert errors.mean() < 0.02
    assert np.quantile(errors, 0.999) < 4 * FP16


def test_the_reference_is_torchvisions_own_sequence() -> None:
    """The reference against the transforms written out once in their order, all switched on."""
    image = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    views = ViewConfig(
        size=33, resize=1.2, crop_scale=(0.3, 0.8), jitter_p=1.0, gray_p=0.5, blur_p=1.0, rotation=40.0, flip_p=0.5
    )
    draws = draw(views, seed=0, epoch=0, indices=np.arange(8), view=0, sizes=np.array([[70, 90]] * 8))
    colours = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    assert draws["gray"].any() and draws["flip"].any() and not draws["gray"].all() and not draws["flip"].all()
    made = make_views([image] * 8, draws, size=33, blur_kernel=views.blur_kernel, implementation="reference")
    for view, ours in zip(draws, made, strict=True):
        x = F.to_dtype(torch.from_numpy(image).permute(2, 0, 1), torch.float32, scale=True)
        x = F.resize(x, [40], antialias=True)
        top, left, height, width = view["window"].tolist()
        assert top >= 3 and left >= 8 and top + height <= 37
        x = F.resized_crop(x, top, left, height, width, [33, 33], antialias=True)
        for which in view["order"]:
            x = colours[which](x, float(view["factor"][which]))
        if view["gray"]:
            x = F.rgb_to_grayscale(x, 3)
        x = F.gaussian_blur(x, [3, 3], [float(view["sigma"])] * 2)
        x = F.rotate(x, float(view["angle"]), F.InterpolationMode.BILINEAR, fill=None)
        x = F.hflip(x) if view["flip"] else x
        torch.testing.assert_close(ours.permute(2, 0, 1).float(), x, rtol=0, atol=5e-4)
