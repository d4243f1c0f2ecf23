"""`fastmoco finetune` on drawn images: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.status import Status
from sklearn.metrics import roc_auc_score

from fastmoco import cli, tracking
from fastmoco.data.manifest import load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate import finetune_command as module
from fastmoco.evaluate.finetune import FinetuneConfig
from fastmoco.evaluate.finetune_command import FinetuneArgs, _Progress, finetune_command
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import save_encoder
from runs import draw_images

VIEWS = {"size": 24, "resize": 1.0, "crop_scale": [0.5, 1.0], "rotation": 7.0, "flip_p": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 drawn images with labels, and encoder.safetensors of a run at 24 pixels."""
    root = tmp_path_factory.mktemp("finetune")
    draw_images(root, 60)
    lines = (root / "labels.csv").read_text().splitlines()
    wide = [line + (",left,right" if i == 0 else f",{i % 2},{int(i % 5 == 0)}") for i, line in enumerate(lines)]
    (root / "labels.csv").write_text("\n".join(wide) + "\n")
    save_encoder(root / "encoder.safetensors", Encoder("resnet18", seed=0), {"views": VIEWS})
    return root


def _args(folder: Path, file: Path, **changes: Any) -> FinetuneArgs:
    said: dict[str, Any] = {"run": folder / "encoder.safetensors", "data": folder / "images"}
    training = FinetuneConfig(mode="linear", epochs=1, least_steps=2)
    return FinetuneArgs(
        **{
            **said,
            "labels": folder / "labels.csv",
            "label": ("kind",),
            "device": "cpu",
            "training": training,
            "out": file,
            **changes,
        }
    )


def test_draws_of_a_small_budget_are_printed_and_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, object] = {
        "--data": folder / "images", "--labels": folder / "labels.csv", "--label": "kind", "--budget": 0.1,
        "--draws": 2, "--mode": "linear", "--epochs": 1, "--least-steps": 3, "--lr": 0.01, "--device": "cpu",
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr("sys.argv", ["fastmoco", "finetune", str(folder / "encoder.safetensors"), *words])
    assert cli.main() == 0
    shown = capsys.readouterr().out
    out = folder / "finetune" / "kind-linear-0.1.json"
    for word in (
        "Test scores for kind, linear",
        "av. prec.",
        "cal. error",
        "10 % of",
        "the least with 5 a class",
        str(out),
    ):
        assert word in shown
    found = json.loads(out.read_text())
    assert (found["label"], found["kind"], found["class_names"], found["leaks"]) == ("kind", "binary", ["0", "1"], [])
    assert found["training"]["mode"] == "linear" and found["training"]["lr"] == 0.01
    assert found["training"]["views"] == {"crop_scale": [0.5, 1.0], "rotation": 7.0, "flip_p": 0.25}
    truth = [row["value"] for row in found["test"]]
    assert len(truth) == found["images"]["test"] == 20
    assert found["budget"]["asked"] == 0.1 and all(used > 0.1 for used in found["budget"]["used"])
    draws = found["draws"]
    assert len(draws) == 2 and draws[0]["probabilities"] != draws[1]["probabilities"]
    areas = []
    for draw in draws:
        said = np.array(draw["probabilities"])
        assert said.shape == (20, 2) and draw["images"] >= 10
        areas.append(roc_auc_score(truth, said[:, 1]))
        assert draw["test"]["auc"] == pytest.approx(areas[-1], abs=1e-9)
        assert f"{draw['test']['auc']:.3f}" in shown and f"{draw['validation_auc']:.3f}" in shown
    auc = found["auc"]
    assert auc["mean"] == pytest.approx(np.mean(areas)) and auc["low"] <= auc["mean"] <= auc["high"]


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pipe = Console(file=io.StringIO(), width=100)
    told = _Progress(pipe, Status("", console=pipe), "draw 1 of 2", 40)
    for now[0], step, auc in ((104.0, 10, 0.5), (115.0, 20, 0.625), (116.0, 30, None)):
        told.look({"step": step, "validation_auc": auc})
    assert isinstance(pipe.file, io.StringIO)
    assert pipe.file.getvalue() == "draw 1 of 2: step 20/40, validation AUC 0.625, ETA 0:00:15\n"


def test_several_labels_from_scratch_without_a_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "both.json"
    training = FinetuneConfig(mode="scratch", epochs=1, least_steps=1, most_steps=1)
    args = _args(folder, out, run=None, label=("left", "right"), size=16, training=training, flip_p=0.5)
    assert finetune_command(args) == 0
    found = json.loads(out.read_text())
    assert (found["run"], found["kind"], found["class_names"]) == (None, "multilabel", ["left", "right"])
    assert found["training"]["views"] == {"crop_scale": None, "rotation": 0.0, "flip_p": 0.5}
    assert found["test"][0]["value"] == [1, 1] and np.array(found["draws"][0]["probabilities"]).shape == (20, 2)
    for name in ("auc", "average_precision", "accuracy", "calibration_error"):
        assert 0 <= found["draws"][0]["test"][name] <= 1


def test_scratch_takes_the_runs_architecture_and_not_its_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, FinetuneConfig]] = []

    def stop(encoder: object, *args: Any, **_: Any) -> None:
        seen.append((encoder, args[5]))
        raise UserError("seen")

    monkeypatch.setattr(module, "finetune", stop)
    shutil.copytree(folder / "images", tmp_path / "images")
    save_encoder(tmp_path / "encoder.safetensors", Encoder("resnet34", seed=0), {"views": VIEWS})
    args = _args(folder, tmp_path / "o.json", run=tmp_path, training=FinetuneConfig(mode="scratch"), rotation=0.0)
    with pytest.raises(UserError, match="seen"):
        finetune_command(args)
    ((encoder, config),) = seen
    assert encoder is None and config.arch == "resnet34"
    assert config.views is not None and (config.views.rotation, config.views.flip_p) == (0.0, 0.25)


def test_images_in_two_parts_stop_it_unless_they_are_allowed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    # 000.jpg is of the training images, 004.jpg of the test's.
    shutil.copy(tmp_path / "images/000.jpg", tmp_path / "images/004.jpg")
    args = _args(folder, tmp_path / "o.json", data=tmp_path / "images")
    with pytest.raises(UserError, match=r"(?s)leak.*same pixels: 000\.jpg \(\w+\), 004\.jpg \(test\).*--allow-leaks"):
        finetune_command(args)
    assert not (tmp_path / "o.json").exists()
    args.allow_leaks = True
    assert finetune_command(args) == 0
    assert len(json.loads((tmp_path / "o.json").read_text())["leaks"]) == 1


def test_images_without_a_class_and_those_pretrained_on_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, first, *rest = (folder / "labels.csv").read_text().splitlines()
    cells = first.split(",")
    cells[header.split(",").index("kind")] = ""
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    run = tmp_path / "run"
    save_encoder(run / "encoder.safetensors", Encoder("resnet18", seed=0), {"views": VIEWS})
    (run / "config.json").write_text("{}")
    write_manifest(run / "manifest.csv", load_manifest(folder / "images", labels, label=("kind",), progress=False))
    out = tmp_path / "o.json"
    assert finetune_command(_args(folder, out, run=run / "encoder.safetensors", labels=labels)) == 0
    found = json.loads(out.read_text())
    assert found["class_names"] == ["0", "1"] and sum(found["images"].values()) == 59
    without, steps, seen = found["notes"]
    assert steps == "2 steps, more than --epochs 1 has: --least-steps 2."
    assert without == "1 image without a class in kind left out." and without in capsys.readouterr().out
    assert seen.startswith(f"{found['images']['test']} of the {found['images']['test']} test images were pretrained on")


def test_mistakes_are_named_before_any_image_is_read(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    scratch = FinetuneConfig(mode="scratch")
    for changes, message in (
        ({"run": None}, "--mode linear: name the run"),
        ({"run": None, "training": scratch}, "without a run give --size"),
        ({"run": None, "training": scratch, "size": 16, "out": None}, "--out: name the file"),
        ({"out": tmp_path}, "is a folder"),
        ({"label": ()}, "say with --label which"),
        ({"budget": 0.0}, "--budget 0"),
        ({"label": ("left", "right"), "budget": 0.5}, "several labels"),
    ):
        with pytest.raises(UserError, match=message):
            finetune_command(_args(folder, out, **changes))
    with pytest.raises(UserError, match="--draws must be"):
        _args(folder, out, draws=0)
