"""What a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastmoco
from fastmoco.train.curves import draw_curves
from fastmoco.train.metrics import Row, read_rows
from fastmoco.train.pretrain import pretrain
from runs import draw_images, small_config


def test_a_run_folder_holds_what_the_readme_says(tmp_path: Path) -> None:
    images = draw_images(tmp_path)
    labelled = {"labels": images.parent / "labels.csv", "label": ("kind",), "split": "train"}
    config = small_config(images, tmp_path / "run", method="barlow", knn_every=1, **labelled)
    assert pretrain(config) == tmp_path / "run"
    run = tmp_path / "run"
    names = {"config.json", "environment.json", "metrics.jsonl", "curves.png", "encoder.safetensors"}
    assert names <= {path.name for path in run.iterdir()}
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((run / "config.json").read_text())
    assert (stored["recipe"], stored["loss"]["method"], stored["optim"]["batch_size"]) == (
        "histology-barlow-small", "barlow", 4
    )  # fmt: skip
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        parts = row["infonce"] + sum(row[f"stage{s}"] for s in (1, 2, 3, 4))
        assert row["loss"] == pytest.approx(parts, rel=1e-6)
    assert {"pairs_per_s", "queue_fill", "data_wait"} <= rows[1].keys()
    assert rows[1]["queue_fill"] == 8 / 19
    assert 0 <= rows[-1]["knn_accuracy"] <= 1
    encoder = fastmoco.load_encoder(run)
    assert encoder(torch.rand(2, 3, 32, 32)).embedding.shape == (2, 16)
    exported = fastmoco.load_encoder(run / "encoder.safetensors")
    for name, value in exported.backbone.state_dict().items():
        assert torch.equal(value, encoder.backbone.state_dict()[name]), name


@pytest.mark.parametrize("missing", [["knn_accuracy"], ["infonce", "stage1", "stage2"], ["top1", "top5", "lr"]])
def test_curves_are_of_what_there_is(missing: list[str], tmp_path: Path) -> None:
    names = ["infonce", "stage1", "stage2", "stage3", "stage4", "top1", "top5", "embedding_std", "lr", "knn_accuracy"]
    rows: list[Row] = [{"step": step} | {n: 1.0 / step for n in names if n not in missing} for step in (1, 2)]
    draw_curves([*rows, {"step": 3, "pairs_per_s": 7.0}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ended_before_its_first_step_has_no_curves(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
