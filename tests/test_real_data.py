"""Real images of the paper's domains, where they lie beside the project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import find_pairs
from fastmoco.data.views import ViewConfig
from fastmoco.evaluate.splits import make_splits
from fastmoco.train.metrics import read_rows
from fastmoco.train.pretrain import pretrain
from runs import small_config

pytestmark = pytest.mark.usefixtures("undrawn")

VIEWS = {
    "idc_patches": ViewConfig(size=64, resize=256 / 255, crop_scale=(0.4, 1.0), flip_p=0.5),
    "nih_chestxray14_64": ViewConfig(size=64, resize=1.0, rotation=30.0),
    "idrid_fundus_256": ViewConfig(size=64, resize=1.0, rotation=30.0, flip_p=0.5),
}


def test_the_histology_set_is_read_as_it_is_described(real_data: Callable[[str], Path]) -> None:
    folder = real_data("idc_patches")
    found = load_manifest(folder / "images", folder / "labels.csv", label=("idc",), progress=False)
    assert (len(found), found.skipped) == (2740, [])
    assert found.patients is not None
    splits = make_splits(found, "idc", seed=0)
    parts = {"train": np.concatenate([splits.train, splits.validation]), "test": splits.test}
    counts = {name: np.bincount(found.labels["idc"][part]).tolist() for name, part in parts.items()}
    assert counts == {"train": [1491, 563], "test": [552, 134]}
    patients = {name: set(found.patients[part].tolist()) for name, part in parts.items()}
    assert {name: len(some) for name, some in patients.items()} == {"train": 47, "test": 20}
    assert not set(found.patients[splits.train].tolist()) & set(found.patients[splits.validation].tolist())


def test_the_names_of_histology_patches_say_what_their_table_does(real_data: Callable[[str], Path]) -> None:
    folder = real_data("idc_patches")
    table = load_manifest(folder / "images", folder / "labels.csv", label=("idc",), progress=False)
    found = load_manifest(folder / "images", progress=False)
    order = np.argsort(table.files)
    assert found.files == [table.files[i] for i in order]
    assert found.patients is not None and table.patients is not None
    assert np.array_equal(found.patients, table.patients[order])
    assert np.array_equal(found.labels["class"], table.labels["idc"][order])


@pytest.mark.skipif(not dali_installed(), reason="no DALI here")
@pytest.mark.parametrize("name", sorted(VIEWS))
def test_both_loaders_make_the_same_views_of_real_files(name: str, real_data: Callable[[str], Path]) -> None:
    """Patches as small as 50 x 8, gray stored as RGBA, JPEG: decoders included, the mean differs by under 1/255."""
    folder = real_data(name)
    manifest = load_manifest(folder / "images", folder / "labels.csv", decoder="dali", progress=False)
    assert manifest.skipped == []
    order = Order(len(manifest), 48, seed=3)
    pairs = []
    for kind in ("dali", "torchvision"):
        with make_loader(kind, manifest, VIEWS[name], order, start=0, stop=1, workers=0) as loader:
            pairs.append(next(loader))
    assert np.array_equal(pairs[0].indices, pairs[1].indices)
    for ours, theirs in ((pairs[0].q, pairs[1].q), (pairs[0].k, pairs[1].k)):
        assert theirs.float().std() > 0.05
        assert (ours.float() - theirs.float()).abs().mean() < 1 / 255


@pytest.mark.parametrize(
    "kind", [pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here")), "pillow"]
)
def test_pairs_of_histology_patches_are_of_one_patient(kind: LoaderKind, real_data: Callable[[str], Path]) -> None:
    folder = real_data("idc_patches")
    manifest = load_manifest(folder / "images", decoder=kind, progress=False)
    views = ViewConfig(size=50, resize=1.0, jitter_p=0, gray_p=0, blur_p=0)
    order = Order(len(manifest), 64, seed=3, pairs=find_pairs("patient", manifest))
    with make_loader(kind, manifest, views, order, start=5, stop=7, workers=1) as loader:
        batches = list(loader)
    for t, batch in enumerate(batches, start=5):
        slots = order.batch(t)
        assert manifest.patients is not None and (slots.keys != slots.indices).all()
        np.testing.assert_array_equal(manifest.patients[slots.keys], manifest.patients[slots.indices])
        for views_of, indices in ((batch.q, batch.indices), (batch.k, slots.keys)):
            for view, index in zip(views_of, indices.tolist(), strict=True):
                # Of a whole patch of that size a view is the patch.
                if tuple(manifest.sizes[index]) == (50, 50):
                    pixels = np.asarray(Image.open(manifest.path(index)).convert("RGB"))
                    difference = view.permute(1, 2, 0).float().numpy() - pixels / 255
                    assert np.abs(difference).max() < 1 / 255


@pytest.mark.parametrize(
    "loader", [pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here")), "pillow"]
)
def test_training_over_odd_files_finishes(loader: str, real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """CMYK, palettes, 16 bits, DICOM, rotation, one pixel, rot: each is trained on, or was reported as unreadable."""
    folder = real_data("odd_encodings")
    config = small_config(
        folder, tmp_path / "run", loader=loader, steps=20, drop_last=False, max_bad=0, workers=2, checkpoint_every=100
    )
    out = pretrain(config)
    assert len(read_rows(out / "metrics.jsonl")) == 20
    assert not (out / "bad_files.txt").exists()
    trained = (out / "manifest.csv").read_text().splitlines()[1:]
    skipped = (out / "skipped.txt").read_text().splitlines()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # Neither suffix is an image's.
    found -= {"index.csv", "SHA256SUMS", "pillow/pngtest_bad.png.bin"}
    assert {line.split(",")[0] for line in trained} | {line.split(": ")[0] for line in skipped} == found
    assert 76 <= len(trained) <= 80
