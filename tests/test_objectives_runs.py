"""Runs of the objectives beside MoCo: what they train, keep, go on from and refuse."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.data.loader import Batch
from fastmoco.data.manifest import Manifest
from fastmoco.data.manifest_file import read_manifest_file, write_manifest
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.losses import BarlowTwins
from fastmoco.models.weights import load_encoder
from fastmoco.train.classes import classes, describe_classes
from fastmoco.train.config import LossConfig
from fastmoco.train.images import fingerprint
from fastmoco.train.joint import draw_share
from fastmoco.train.opening import describe_score
from fastmoco.train.pretrain import pretrain
from fastmoco.train.trainer import Trainer
from objectives import OBJECTIVES, TARGETS, changes_of
from runs import NARROW, NoSync, draw_images, references_only, small_config

EACH = pytest.mark.parametrize("name", OBJECTIVES)
# Those that others are a part of take seconds for what these show.
FEW = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.system] if name in ("simclr", "barlow-twins") else [])
        for name in OBJECTIVES
    ],
)


def config_of(name: str, out: Path, data: Path = Path(), **changes: Any) -> Any:
    return small_config(
        data, out, method="mse" if changes.pop("stages", False) else "moco", **(changes_of(name) | changes)
    )


def trainer(name: str, **changes: Any) -> Trainer:
    config = config_of(name, Path(), log_every=99, **changes)
    return Trainer(config, precision=config.run.precision, world=World(), targets=TARGETS)


def batch(seed: int, n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(n, 3, 32, 32, generator=generator).half() for _ in range(2))
    q, k = (view.to(memory_format=torch.channels_last) for view in (q, k))
    return Batch(q, k, np.arange(n) + seed % 8)


@EACH
@pytest.mark.parametrize(
    ("update", "precision"), [("fused", "bf16"), pytest.param("torch", "fp32", marks=pytest.mark.system)]
)
def test_a_step_trains_without_waiting_for_the_device(
    name: str, update: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    references_only(monkeypatch)
    t = trainer(name, update=update, precision=precision, stages=True)
    before = {key: value.clone() for key, value in t.module.query.named_parameters()}
    with NoSync():
        t.step([batch(0)], lr=0.1)
    row = t.history.read()[0]
    assert set(t.module.loss_names) < row.keys() and all(np.isfinite(value) for value in row.values())
    moved = [key for key, value in t.module.query.named_parameters() if not torch.equal(value, before[key])]
    assert {"backbone.conv1.weight", "head.weight" if "head.weight" in before else "head.0.weight"} <= {*moved}
    assert t.pairs == 4
    assert t.queue_fill == (8 / 19 if name == "symmetric" else None)


@FEW
def test_what_goes_on_from_a_checkpoint_is_as_if_it_had_not_stopped(name: str) -> None:
    whole, first, second = (trainer(name) for _ in range(3))
    for seed in range(4):
        whole.step([batch(seed)], lr=0.05)
    for seed in range(2):
        first.step([batch(seed)], lr=0.05)
    second.restore(first.checkpoint(2, "data"))
    for seed in range(2, 4):
        second.step([batch(seed)], lr=0.05)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key


def test_the_share_of_the_first_view_is_drawn_anew_for_every_batch() -> None:
    shares = [draw_share(3, t) for t in range(400)]
    assert shares == [draw_share(3, t) for t in range(400)] and len(set(shares)) == 400
    assert abs(np.mean(shares) - 0.5) < 0.05 and min(shares) < 0.02 and max(shares) > 0.98


@FEW
def test_a_run_trains_and_its_encoder_loads(name: str, tmp_path: Path) -> None:
    images = draw_images(tmp_path, side=36)
    changes = {"labels": tmp_path / "labels.csv", "label": ("kind",)}
    out = pretrain(config_of(name, tmp_path / "run", images, steps=4, stages=True, **changes))
    assert load_encoder(out / "encoder.safetensors").arch == NARROW
    encoder = load_encoder(out)
    with torch.no_grad():
        assert encoder(torch.rand(2, 3, 32, 32)).embedding.shape == (2, 16)
    metrics = (out / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 4 and ("queue_fill" in metrics[-1]) == (name == "symmetric")
    assert (out / "curves.png").stat().st_size > 1000


def test_barlow_twins_with_another_head_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = draw_images(tmp_path, side=36)
    for head in ("projector", "mlp"):
        config = config_of("barlow-twins", tmp_path / head, images, steps=1)
        pretrain(replace(config, model=replace(config.model, head=head)))  # type: ignore[arg-type]
        assert ("warning: --head mlp: Barlow Twins wants" in capsys.readouterr().out) == (head == "mlp")


def test_classes_are_numbered_by_what_is_there_the_same_for_all_who_read_the_list(tmp_path: Path) -> None:
    names = np.array(["b", "a", "c", "b", "", "c"])
    sizes = np.full((6, 2), 40, dtype=np.int32)
    _, numbers = np.unique(names, return_inverse=True)
    listed = Manifest(
        root=tmp_path, files=[f"{i}.png" for i in range(6)], sizes=sizes, stamps=sizes, labels={"kind": numbers},
        class_names={"kind": ["", "a", "b", "c"]}, splits=np.array(["t", "x", "t", "t", "t", "t"]),
    )  # fmt: skip
    config = config_of("supcon", tmp_path)
    some = listed.only_split("t")
    write_manifest(tmp_path / "manifest.csv", some)
    read = Manifest(root=tmp_path, **read_manifest_file(tmp_path / "manifest.csv"))
    for manifest in (some, read):
        targets = classes(config, manifest)
        assert targets is not None and targets.tolist() == [0, 1, 0, -1, 1]
        assert describe_classes(manifest, targets) == "classes by label 'kind': 2 classes, 1 images of unknown class"
    assert fingerprint(some, config) == fingerprint(read, config) != fingerprint(some)
    assert classes(config_of("simclr", tmp_path), some) is None
    with pytest.raises(UserError, match=r"label 'kind' has 1 class\(es\) here"):
        classes(config, some.select(np.array([0, 2, 3])))


def test_ranks_are_of_float32_also_where_the_rest_is_not() -> None:
    generator = torch.Generator().manual_seed(4)
    z1 = torch.ones(64, 16) + 1e-2 * torch.randn(64, 16, generator=generator)
    z2 = torch.ones(64, 16) + 1e-2 * torch.randn(64, 16, generator=generator)
    loss = BarlowTwins(scale=1.0, off_diagonal=0.005, mix=0.0, over_all=False, world=World())
    _, rank = loss(z1, z2, None, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        _, under = loss(z1, z2, None, None, None)
    assert torch.equal(under, rank) and float((rank < 5).float().mean()) < 0.3


def test_supervised_contrast_wants_labels(tmp_path: Path) -> None:
    images = draw_images(tmp_path, side=36)
    with pytest.raises(UserError, match="these images have none: give --labels"):
        pretrain(config_of("supcon", tmp_path / "run", images))
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join([lines[0], *(line for line in lines[1:] if line.endswith("1"))]))
    with pytest.raises(UserError, match="every image has the same value"):
        pretrain(config_of("supcon", tmp_path / "run", images, labels=tmp_path / "one.csv", label=("kind",)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "simclr", "symmetric": True}, "--symmetric is for --objective moco, not simclr"),
        ({"objective": "barlow-twins", "margin": 0.1}, "--margin is for --objective moco or simclr"),
        ({"mix_weight": 1.0}, "--mix-weight is for --objective barlow-twins, not moco"),
        ({"margin": -0.1}, "--margin must be from 0 to 2, not -0.1"),
        ({"objective": "simclr", "margin": 2.1}, "--margin must be from 0 to 2, not 2.1"),
        ({"objective": "simclr", "key_shuffle": "global"}, "has no key encoder"),
    ],
)
def test_options_of_another_objective_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LossConfig(**changes)


def test_batches_that_do_not_fit_are_refused() -> None:
    config = small_config(Path(), Path(), method="moco")
    with pytest.raises(UserError, match="the 20 keys of --batch-size 10"):
        dataclasses.replace(
            config,
            loss=dataclasses.replace(config.loss, symmetric=True),
            optim=dataclasses.replace(config.optim, batch_size=10),
        )
    loss = dataclasses.replace(config.loss, objective="simclr", queue_size=1)
    with pytest.raises(UserError, match="no other images: give --objective simclr at least 2"):
        dataclasses.replace(config, loss=loss, optim=dataclasses.replace(config.optim, batch_size=1))
    # It has no queue for a batch to fill.
    assert dataclasses.replace(config, loss=loss).loss.title == "simclr"


@pytest.mark.parametrize(
    ("label", "many", "every", "said"),
    [
        ("kind", 2, 1, "kNN score every epoch: by kind, 2 classes (c00, c01)"),
        ("kind", 30, 10, "kNN score every 10 epochs: by kind, 30 classes (c00, c01, c02, ...)"),
        ("folder", 20, 10, "kNN score every 10 epochs: by folder, 20 classes (c00, c01, c02, ...)"),
        (
            "folder", 21, 10,
            "kNN score every 10 epochs: by folder, 21 classes (c00, c01, c02, ...); if these are patients, not "
            "classes, give --labels a CSV file with columns file and patient",
        ),
    ],
)  # fmt: skip
def test_it_is_said_what_the_score_tells_apart(label: str, many: int, every: int, said: str) -> None:
    names = [f"c{number:02}" for number in range(many)]
    manifest = SimpleNamespace(labels={label: np.arange(many)}, known_classes=lambda _: names)
    config = small_config(Path(), Path(), knn_every=every)
    assert describe_score(config, manifest) == said  # type: ignore[arg-type]
