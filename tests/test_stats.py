"""What `fastmoco data stats` says of a set whose every peculiarity is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco import cli
from fastmoco.data.manifest import load_manifest
from fastmoco.data.stats import statistics, summary


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images: two the same file, one the same pixels in another format, one blank, one 16-bit, one broken."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "copy of 0.png").write_bytes((folder / "0.png").read_bytes())
    Image.open(folder / "1.png").save(folder / "1 again.bmp")
    Image.new("L", (30, 20), 90).save(folder / "blank.png")
    Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    rows = ["file,kind,patient,split"]
    for i, path in enumerate(sorted(folder.iterdir())):
        # Patients of two images each; the last has one in either split.
        rows.append(f"{path.name},{'ab'[i > 6]},p{i // 2},{'test' if i > 8 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return folder


def test_every_peculiarity_is_found(images: Path) -> None:
    manifest = load_manifest(images, images.parent / "labels.csv", label=("kind",), progress=False)
    found = statistics(manifest, progress=False)
    assert found == json.loads(json.dumps(found))
    assert found["images"] == 9 and len(found["left out"]) == 1 and "broken.jpg" in found["left out"][0]
    assert found["unreadable"] == []
    assert found["height"] == {"least": 20, "median": 21, "greatest": 24}
    assert found["width"] == {"least": 30, "median": 30, "greatest": 30}
    assert found["sizes"]["20 x 30"] == 4 and sum(found["sizes"].values()) == 9
    assert found["formats"] == {"PNG RGB, 8 bits": 6, "BMP RGB, 8 bits": 1, "PNG L, 8 bits": 1, "PNG I;16, 16 bits": 1}
    assert found["same file"] == [["0.png", "copy of 0.png"]]
    assert sorted(map(sorted, found["same pixels"])) == [["0.png", "copy of 0.png"], ["1 again.bmp", "1.png"]]
    assert found["nearly empty"] == ["blank.png"]
    assert found["classes"] == {"kind": {"a": 7, "b": 2}}
    assert found["splits"] == {"train": 8, "test": 1} and found["patients"] == 5
    assert found["patients in several splits"] == ["p4"]
    assert found["bytes"]["least"] == min(path.stat().st_size for path in images.iterdir() if path.suffix != ".jpg")
    unit = [manifest.decode(i) / (65535 if manifest.files[i] == "deep.png" else 255) for i in range(9)]
    mean = np.mean([image.mean((0, 1)) for image in unit], axis=0)
    std = np.sqrt(np.mean([(image**2).mean((0, 1)) for image in unit], axis=0) - mean**2)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-4)
    np.testing.assert_allclose(found["std"], std, atol=1e-4)
    lines = dict(summary(found))
    assert lines["patients in several splits"] == "1, the first p4" and lines["label kind"] == "a: 7; b: 2"
    unknown = dict(summary(found | {"classes": {"kind": {"": 3, "a": 7}}}))
    assert unknown["label kind"] == "(no class): 3; a: 7"


def test_threads_change_nothing(images: Path) -> None:
    manifest = load_manifest(images, progress=False)
    assert statistics(manifest, workers=1, progress=False) == statistics(manifest, workers=7, progress=False)


def test_what_cannot_be_read_any_more_is_said(images: Path) -> None:
    manifest = load_manifest(images, progress=False)
    (images / "3.png").unlink()
    found = statistics(manifest, progress=False)
    assert len(found["unreadable"]) == 1 and "3.png: no such file" in found["unreadable"][0]
    assert sum(found["formats"].values()) == 8 and found["patients"] is None and found["splits"] is None


def test_rows_of_an_array(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    pixels[5] = pixels[2]
    labels = np.array([[0], [1], [0], [1], [0], [1]])
    parts = {"train": slice(0, 4), "test": slice(4, 6)}
    arrays = {f"{name}_images": pixels[rows] for name, rows in parts.items()}
    np.savez(tmp_path / "set.npz", **arrays, **{f"{name}_labels": labels[rows] for name, rows in parts.items()})
    found = statistics(load_manifest(tmp_path / "set.npz", progress=False), progress=False)
    assert found["formats"] == {"array L, 8 bits": 6} and found["splits"] == {"train": 4, "test": 2}
    assert "bytes" not in found and "bytes" not in dict(summary(found)), "an image has none of its own"
    (group,) = found["same pixels"]
    assert sorted(group) == ["test/000001", "train/000002"] and found["same file"] == found["same pixels"]


def test_the_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats.json"
    args = ["--data", images, "--labels", images.parent / "labels.csv", "--label", "kind", "--out", out]
    monkeypatch.setattr("sys.argv", ["fastmoco", "data", "stats", *map(str, args)])
    assert cli.main() == 0
    shown = capsys.readouterr().out
    assert "label kind" in shown and "PNG RGB, 8 bits: 6" in shown and "blank.png" in shown and "same pixels" in shown
    assert json.loads(out.read_text())["nearly empty"] == ["blank.png"]
    monkeypatch.setattr("sys.argv", ["fastmoco", "data", "stats", *map(str, args[:4])])
    assert cli.main() == 0 and "kind" in capsys.readouterr().out, "a label that is not named is taken too"
    monkeypatch.setattr("sys.argv", ["fastmoco", "data", "stats", *map(str, [*args[:-1], out / "such.json"])])
    assert cli.main() == 2
    # Before minutes of reading.
    told = capsys.readouterr()
    assert "cannot be written" in told.err and "kind" not in told.out
