"""The preview: the very views of training, what was drawn in words, and a picture of both."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco import cli
from fastmoco.data.loader import make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from fastmoco.data.preview import examples, in_words, save_preview
from fastmoco.data.views import ViewConfig
from fastmoco.ops.views import VIEW, make_views
from runs import draw_images

VIEWS = ViewConfig(size=32, resize=1.2, crop_scale=(0.3, 1.0), rotation=20.0, flip_p=0.5)


def record(**fields: object) -> np.void:
    view = np.zeros(1, dtype=VIEW)
    view["window"], view["order"], view["factor"] = (3, 4, 50, 60), (0, 1, 2, 3), (1, 1, 1, 0)
    for name, value in fields.items():
        view[name] = value
    return view[0]  # type: ignore[no-any-return]


def test_words() -> None:
    assert in_words(record()) == ["crop 50 x 60 at 3, 4"]
    everything = record(
        resized=(64, 80), order=(3, 1, 0, 2), factor=(0.5, 1.25, 1.4, -0.1), sigma=1.234, angle=-12.34, gray=1, flip=1
    )
    assert in_words(everything) == [
        "resized to 64 x 80", "crop 50 x 60 at 3, 4", "hue -36°, contrast x1.25", "brightness x0.50, saturation x1.40",
        "gray, blur 1.23 px, rotated -12.3°, flipped",
    ]  # fmt: skip
    assert in_words(record(factor=(1, 1, 0.9, 0), flip=1)) == ["crop 50 x 60 at 3, 4", "saturation x0.90", "flipped"]
    assert in_words(record(resized=(50, 60), window=(0, 0, 50, 60))) == ["resized to 50 x 60"]


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_views_are_trainings(tmp_path: Path, epoch: int) -> None:
    manifest = load_manifest(draw_images(tmp_path), progress=False)
    shown = examples(manifest, VIEWS, seed=5, epoch=epoch, count=6, kind="pillow", workers=1)
    order = Order(len(manifest), 4, seed=5)
    start = epoch * order.batches_per_epoch
    with make_loader("pillow", manifest, VIEWS, order, start=start, stop=start + 2, workers=1) as batches:
        trained = list(batches)
    indices = np.concatenate([batch.indices for batch in trained])
    assert [example.files for example in shown] == [(manifest.files[i],) * 2 for i in indices[:6]]
    for place, name in enumerate("qk"):
        views = torch.cat([getattr(batch, name) for batch in trained])[:6].permute(0, 2, 3, 1).float().numpy()
        np.testing.assert_array_equal([example.views[place] for example in shown], views)
    for example in shown:
        np.testing.assert_array_equal(example.images[0], np.asarray(Image.open(manifest.root / example.files[0])))
        # The words are of the records that made these views.
        alone = np.array(example.drawn)
        alone["image"] = 0
        made = make_views([example.images[0]], alone, size=32, blur_kernel=VIEWS.blur_kernel).float().numpy()
        np.testing.assert_array_equal(made, example.views)


def test_views_of_two_images_of_a_patient(tmp_path: Path) -> None:
    folder = draw_images(tmp_path)
    manifest = load_manifest(folder, tmp_path / "labels.csv", progress=False)
    options = {"seed": 5, "epoch": 1, "count": 6, "kind": "pillow", "workers": 1}
    plain, shown = examples(manifest, VIEWS, **options), examples(manifest, VIEWS, **options, pairs="patient")
    for one, example in zip(plain, shown, strict=True):
        query, key = (int(name[:3]) for name in example.files)
        # A patient has two images.
        assert example.files[0] == one.files[0] and query // 2 == key // 2 and query != key
        for place, name in enumerate(example.files):
            np.testing.assert_array_equal(example.images[place], np.asarray(Image.open(folder / name)))
            alone = np.array(example.drawn)[place : place + 1]
            alone["image"] = 0
            made = make_views([example.images[place]], alone, size=32, blur_kernel=VIEWS.blur_kernel)
            np.testing.assert_array_equal(made[0].float().numpy(), example.views[place])
    for name, some in (("plain", plain), ("pairs", shown)):
        save_preview(some, tmp_path / f"{name}.png")
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("plain", "pairs")]
    assert widths[0] * 4 == widths[1] * 3


def test_the_picture_shows_image_and_views(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "a $1 in a name$.png")
    Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16)).save(folder / "b.png")
    views = ViewConfig(size=32, crop_scale=(0.5, 1.0), jitter_p=0, gray_p=0, blur_p=0)
    manifest = load_manifest(folder, progress=False)
    shown = examples(manifest, views, seed=0, epoch=0, count=9, kind="pillow", workers=1)
    assert sorted(example.files[0] for example in shown) == ["a $1 in a name$.png", "b.png"]
    save_preview(shown, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).reshape(-1, 3)
    # Three squares of red and three of the gray that 16 bits hold, a view's float16 included.
    for colour in ((255, 0, 0), (128, 128, 128)):
        assert 0.2 < (np.abs(pixels.astype(int) - colour).max(axis=1) <= 1).mean() < 0.5


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = draw_images(tmp_path / "data"), tmp_path / "preview.png"

    def fastmoco(*args: object) -> int:
        monkeypatch.setattr("sys.argv", ["fastmoco", "data", "preview", *map(str, args)])
        try:
            return cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)

    options = ["--data", images, "--size", 32, "--out", out, "--workers", 1]
    assert fastmoco("fundus-mse", *options, "--count", 3, "--rotation", 0) == 0
    assert re.search(r"preview\.png: 3 images of 24 with their views in epoch 0", capsys.readouterr().out)
    first = out.read_bytes()
    assert fastmoco("fundus-mse", *options, "--count", 3, "--rotation", 0) == 0 and out.read_bytes() == first
    assert fastmoco("fundus-mse", *options, "--count", 3, "--seed", 1) == 0 and out.read_bytes() != first
    capsys.readouterr()
    assert fastmoco("fundus-mse", *options, "--pairs", "patient") == 2 and "--pairs patient:" in capsys.readouterr().err
    assert fastmoco(*options) == 2 and "name a recipe first" in capsys.readouterr().err
    assert fastmoco("fundus-mze", *options) == 2 and "did you mean" in capsys.readouterr().err
    assert fastmoco("fundus-mse", *options, "--count", 0) == 2 and "--count must be" in capsys.readouterr().err
    assert fastmoco("fundus-mse", *options[:-4], "--out", tmp_path / "made/for it.png", "--count", 1) == 0
    assert (tmp_path / "made/for it.png").is_file()
    assert fastmoco("fundus-mse", *options[:-4], "--out", out / "such.png") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert fastmoco("fundus-mse", *options[:-4], "--out", tmp_path / "picture.jpg") == 2
    assert "picture.jpg: the picture is a PNG file" in capsys.readouterr().err
    assert fastmoco("fundus-mse", "--help") == 0 and "--blur-sigma" in capsys.readouterr().out
