"""Patients and images in two parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.data.pack import pack
from fastmoco.data.store import BadFile
from fastmoco.evaluate.leaks import find_leaks, pretrained_on, seen_before
from fastmoco.evaluate.splits import make_splits
from runs import draw_images


def _load(folder: Path) -> Manifest:
    return load_manifest(folder / "images", folder / "labels.csv", label=("kind",), progress=False)


def test_clean_splits_leak_nothing(tmp_path: Path) -> None:
    draw_images(tmp_path)
    # Two times the same picture, in one part: no leak.
    shutil.copy(tmp_path / "images/000.jpg", tmp_path / "images/002.jpg")
    manifest = _load(tmp_path)
    assert find_leaks(manifest, make_splits(manifest, "kind", seed=0)) == []


def test_patients_and_pixels_in_two_parts_are_listed(tmp_path: Path) -> None:
    images = draw_images(tmp_path)
    labels = tmp_path / "labels.csv"
    # Patient p2 is in the test split: put one of its two images into training.
    labels.write_text(labels.read_text().replace("004.jpg,p2,test", "004.jpg,p2,train"))
    # The same pixels as an image of p5 (test) in an image of p0 (train), in another encoding.
    with Image.open(images / "011.png") as picture:
        picture.save(images / "001.png", compress_level=0)
    assert (images / "001.png").read_bytes() != (images / "011.png").read_bytes()
    manifest = _load(tmp_path)
    splits = make_splits(manifest, "kind", seed=0, allow_leaks=True)
    where = "train" if 1 in splits.train else "validation"
    other = "train" if 4 in splits.train else "validation"
    found = find_leaks(manifest, splits)
    assert found == [f"patient p2: 1 in test, 1 in {other}", f"same pixels: 001.png ({where}), 011.png (test)"]


def test_images_without_a_patient_are_of_no_patient(tmp_path: Path) -> None:
    draw_images(tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text(labels.read_text().replace(",p2,", ",,").replace(",p3,", ",,"))
    manifest = _load(tmp_path)
    assert find_leaks(manifest, make_splits(manifest, "kind", seed=0)) == []


def test_an_image_that_has_changed_is_no_clean_one(tmp_path: Path) -> None:
    images = draw_images(tmp_path)
    manifest = _load(tmp_path)
    (images / "001.png").write_bytes(b"not a picture")
    with pytest.raises(BadFile, match=r"001\.png"):
        find_leaks(manifest, make_splits(manifest, "kind", seed=0))


def test_packed_images_are_known_by_their_sizes(tmp_path: Path) -> None:
    draw_images(tmp_path)
    manifest, run = _load(tmp_path), tmp_path / "run"
    splits = make_splits(manifest, "kind", seed=0)
    run.mkdir()
    (run / "config.json").write_text("{}")

    def told(pretrained: Manifest, own: Manifest) -> tuple[str, ...]:
        write_manifest(run / "manifest.csv", pretrained)
        return seen_before(pretrained_on(run), own, splits)

    packed = pack(manifest, tmp_path / "shards", shard_bytes=1 << 20, progress=False)
    (by_name,), (by_size,) = told(manifest, manifest), told(packed, manifest)
    count = len(splits.test)
    assert by_name.startswith(f"{count} of the {count} test images were pretrained on, ")
    assert by_size.startswith(f"{count} of the {count} test images have the height, width and bytes of images that")
    # Uncompressed images of one size say nothing, nor do a few.
    assert manifest.stamps is not None and packed.stamps is not None
    same = [replace(of, sizes=0 * of.sizes + 8, stamps=np.full_like(of.stamps, 99)) for of in (packed, manifest)]
    assert told(*same) == ()
    assert told(packed.select(splits.test[:1]), manifest) == ()
