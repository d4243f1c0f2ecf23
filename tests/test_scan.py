"""`fastmoco data scan`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco import cli
from fastmoco.data.dali_check import dali_version
from fastmoco.data.manifest import load_manifest
from fastmoco.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_a_clean_folder(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["data", "scan", str(images), "--strict", "--decoder", "pillow"]) == 0
    shown = capsys.readouterr().out
    assert "3 images (2 png, 1 jpg)" in shown and "left out: 0" in shown and "on the host: 3" in shown


def test_strict_fails_where_something_is_left_out(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "d.png").write_bytes(b"")
    assert cli.dispatch(["data", "scan", str(images)]) == 0
    assert cli.dispatch(["data", "scan", str(images), "--strict"]) == 1
    assert "left out: d.png: empty" in capsys.readouterr().out


def test_the_manifest_that_it_writes_is_trusted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.csv"
    assert cli.dispatch(["data", "scan", str(images), "--out", str(out)]) == 0
    assert "trusted" not in capsys.readouterr().out
    found = load_manifest(images, out, progress=False)
    assert found.files == ["a.png", "b.png", "c.jpg"] and found.decode(2).shape == (9, 12, 3)
    assert found.dali.all() == (dali_version() is not None)
    (images / "c.jpg").unlink()
    assert cli.dispatch(["data", "scan", str(images), "--labels", str(out), "--strict"]) == 0
    shown = capsys.readouterr().out
    assert f"{out} is trusted: no image was read" in shown and "--check" not in shown
    with pytest.raises(UserError, match=r"--out .*: no such folder"):
        cli.dispatch(["data", "scan", str(images), "--out", str(tmp_path / "none" / "m.csv")])


def test_it_writes_over_no_file_that_holds_more_than_a_manifest(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, other, manifest = tmp_path / "l.csv", tmp_path / "other.csv", tmp_path / "m.csv"
    labels.write_text("file,kind,note\na.png,1,x\nb.png,0,y\n")
    other.write_text("mine\n")
    scan = ["data", "scan", str(images), "--labels", str(labels), "--label", "kind", "--out"]
    for out, reason in (
        (labels, "is the file of --labels"),
        (other, "no manifest file; name another"),
        (tmp_path, "a folder; name a file"),
    ):
        with pytest.raises(UserError, match=reason):
            cli.dispatch([*scan, str(out)])
    assert labels.read_text().startswith("file,kind,note\n") and other.read_text() == "mine\n"
    # One that was written before is written anew.
    assert cli.dispatch([*scan, str(manifest)]) == 0 == cli.dispatch([*scan, str(manifest)])

    def full(path: Path, manifest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastmoco.data.scan.write_manifest", full)
    with pytest.raises(UserError, match=r"--out .*m\.csv: cannot be written: .*No space left"):
        cli.dispatch([*scan, str(manifest)])


def test_mistakes_are_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did you mean scan"):
        cli.dispatch(["data", "scna"])
    with pytest.raises(UserError, match="no such folder"):
        cli.dispatch(["data", "scan", str(images / "none")])
    for command in (["scan"], ["stats"], ["pack", "--out", str(images / "out")]):
        for words, reason in (
            ([], "name the folder of images: as PATH, or with --data PATH"),
            ([str(images), "--data", "b"], "--data b: .* is named as well"),
            (["--data", str(images), "--workers", "-3"], "--workers -3: give a number of threads"),
        ):
            with pytest.raises(UserError, match=reason):
                cli.dispatch(["data", *command, *words])
    assert cli.dispatch(["data"]) == 2
    assert "scan" in capsys.readouterr().out


def test_an_index_that_is_trusted_is_said_to_be(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert cli.dispatch(["data", "pack", str(images), "--out", str(out)]) == 0
    assert cli.dispatch(["data", "scan", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out / 'index.csv'} is trusted: no image was read" in shown
    assert f"fastmoco data pack --out {out} --check" in shown
    assert cli.dispatch(["data", "scan", str(out / "shard-000000.tar")]) == 0
    assert "trusted" not in capsys.readouterr().out, "a shard by itself is read"


def test_all_take_the_images_with_and_without_an_option(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named in ([str(images)], ["--data", str(images)]):
        for command in (["scan"], ["stats"], ["pack", "--out", str(tmp_path / "shards")]):
            assert cli.dispatch(["data", command[0], *named, *command[1:]]) == 0
            assert re.search(r"3 images|images +│ 3 ", capsys.readouterr().out)
