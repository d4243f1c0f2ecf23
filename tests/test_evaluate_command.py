"""`fastmoco evaluate`: what it writes, what it tells of the images, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tinted import draw_tinted

from fastmoco.data.manifest import load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.run import EvaluateArgs, default_folder, evaluate_command
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import save_encoder
from runs import NARROW

SIZE = 33


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tinted(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(NARROW, head="mlp", dim=7, seed=1)


def test_command_scores_every_label_and_writes_all_three_files(
    folder: Path, tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "encoder.safetensors"
    save_encoder(path, encoder, {"views": {"size": SIZE, "resize": 1.125}})
    args = EvaluateArgs(
        run=path, data=folder, labels=folder / "labels.csv", label=("warm", "coin"), workers=0, batch_size=45
    )
    assert evaluate_command(args) == 0
    out = tmp_path / "run" / "evaluation" / "encoder"
    assert default_folder(path) == out
    results = json.loads((out / "evaluation.json").read_text())
    assert [r["label"] for r in results] == ["warm", "coin"]
    # The exported file has the backbone only, so there is no "final".
    assert {r["features"] for r in results[0]["rows"]} == {
        "image",
        "16x16",
        "stage1",
        "stage2",
        "stage3",
        "stage4",
    }
    assert any(str(path) in line for line in results[0]["context"])
    assert any("33x33" in line and "resized to 37" in line for line in results[0]["context"])
    printed = capsys.readouterr().out
    assert "Test scores for warm" in printed and "Test scores for coin" in printed
    assert sorted(p.name for p in out.iterdir()) == ["evaluation.csv", "evaluation.json", "evaluation.md"]
    first = (out / "evaluation.json").read_bytes()
    assert evaluate_command(args) == 0
    assert (out / "evaluation.json").read_bytes() == first


def test_command_with_class_folders(folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    data = tmp_path / "data"
    for i in range(24):
        name = "left" if i % 2 else "right"
        (data / name).mkdir(parents=True, exist_ok=True)
        (data / name / f"{i}.png").write_bytes((folder / f"{i:03d}.png").read_bytes())
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {})
    args = EvaluateArgs(run=path, data=data, size=32, workers=0, baselines=False, out=tmp_path / "out")
    assert evaluate_command(args) == 0
    (result,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["label"] == "folder" and result["patients"] is None
    assert {r["encoder"] for r in result["rows"]} == {"pretrained"}
    assert result["origin"] == "test drawn by image; validation drawn by image from the training images"


def test_images_without_a_class_and_files_not_there_are_left_out_and_told(
    folder: Path, tmp_path: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {})
    header, *lines = (folder / "labels.csv").read_text().splitlines()
    unknown = [re.sub(r"[01],([01])$", r",\1", line) if i % 9 == 0 else line for i, line in enumerate(lines)]
    kept = [line for i, line in enumerate(lines) if i % 9]
    found = []
    for name, rows in (("partly", [*unknown, "gone.png,p0,train,1,0"]), ("known", kept)):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
        args = EvaluateArgs(
            run=path, data=folder, labels=tmp_path / f"{name}.csv", label=("warm",), size=32, workers=0,
            baselines=False, out=tmp_path / name,
        )  # fmt: skip
        assert evaluate_command(args) == 0
        (result,) = json.loads((tmp_path / name / "evaluation.json").read_text())
        found.append(result["rows"])
    shown = capsys.readouterr().out
    assert "left out 1 file, the first gone.png: no such file" in shown
    assert "10 images without a class in warm left out." in shown and "1 file left out: not there" in shown
    assert found[0] == found[1]
    assert "10 images without a class in warm left out." in (tmp_path / "partly" / "evaluation.md").read_text()


def nearly(found: Any) -> Any:
    """What equals `found`, but for the sixth digit of fractions."""
    if isinstance(found, dict):
        return {name: nearly(value) for name, value in found.items()}
    if isinstance(found, list):
        return [nearly(value) for value in found]
    return pytest.approx(found, rel=1e-6) if isinstance(found, float) else found


def test_a_label_is_scored_on_all_images_that_have_it_whichever_others_are_asked_for(
    folder: Path, tmp_path: Path, encoder: Encoder
) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {})
    header, *lines = (folder / "labels.csv").read_text().splitlines()
    rows = [re.sub(r"[01]$", "", line) if i % 4 == 0 else line for i, line in enumerate(lines)]
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    found = {}
    for asked in (("warm",), ("coin",), ("warm", "coin")):
        args = EvaluateArgs(
            run=path, data=folder, labels=tmp_path / "labels.csv", label=asked, size=32, workers=0, baselines=False,
            out=tmp_path / "out",
        )  # fmt: skip
        assert evaluate_command(args) == 0
        found[asked] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # A batch of other images may round an image's features otherwise.
    assert found["warm", "coin"] == nearly(found["warm",] + found["coin",])
    assert [sum(result["images"].values()) for result in found["warm", "coin"]] == [90, 67]


def test_test_images_that_were_pretrained_on_are_told(folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "run" / "encoder.safetensors"
    save_encoder(path, encoder, {})
    labels = folder / "labels.csv"
    everything = load_manifest(folder, labels, label=("warm",), progress=False)
    assert everything.splits is not None
    args = EvaluateArgs(run=path, data=folder, labels=labels, label=("warm",), size=32, workers=0, baselines=False)
    listed, config = tmp_path / "run" / "manifest.csv", tmp_path / "run" / "config.json"
    for some, of_a_run, said in (
        (everything, False, False),
        (everything, True, True),
        (everything.only_split("train"), True, False),
    ):
        write_manifest(listed, some)
        if of_a_run:
            config.write_text("{}")
        assert evaluate_command(args) == 0
        (result,) = json.loads((default_folder(path) / "evaluation.json").read_text())
        assert any("30 of the 30 test images were pretrained on" in line for line in result["context"]) is said
    listed.write_text(listed.read_text() + "damaged\n")
    assert evaluate_command(args) == 0
    # Others of the same names.
    others = tmp_path / "others"
    others.mkdir()
    for i, file in enumerate(everything.files):
        Image.new("RGB", (20, 20), (i, i, i)).save(others / file)
    write_manifest(listed, load_manifest(others, labels, label=("warm",), progress=False))
    assert evaluate_command(args) == 0
    (result,) = json.loads((default_folder(path) / "evaluation.json").read_text())
    assert not any("pretrained on" in line for line in result["context"])


def test_one_image_in_two_splits_stops_the_command_where_it_is_told_to_look(
    folder: Path, tmp_path: Path, encoder: Encoder
) -> None:
    shutil.copytree(folder, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "000.png", tmp_path / "data" / "060.png")
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {})
    labels = tmp_path / "data" / "labels.csv"
    args = EvaluateArgs(run=path, data=tmp_path / "data", labels=labels, label=("warm",), size=32, duplicates=True)
    with pytest.raises(UserError, match=r"same pixels: 000\.png \(\w+\), 060\.png \(test\)"):
        evaluate_command(args)
    assert not (tmp_path / "evaluation").exists()


def test_command_mistakes(folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {})
    with pytest.raises(UserError, match="give --size"):
        evaluate_command(EvaluateArgs(run=path, data=folder))
    with pytest.raises(UserError, match="--label which"):
        evaluate_command(EvaluateArgs(run=path, data=folder, labels=folder / "labels.csv", size=32))
    with pytest.raises(UserError, match="class folders"):
        evaluate_command(EvaluateArgs(run=path, data=folder, size=32))
    with pytest.raises(UserError, match="--device quantum"):
        evaluate_command(
            EvaluateArgs(
                run=path,
                data=folder,
                labels=folder / "labels.csv",
                label=("warm",),
                size=32,
                device="quantum",
            )
        )
    with pytest.raises(UserError, match="--batch-size must be at least 1"):
        EvaluateArgs(run=path, data=folder, batch_size=0)
