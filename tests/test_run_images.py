"""The images of a run: the same when it goes on, wherever they lie, and replaced where they go bad."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pretrain import LOADERS, final_tensors, loss_columns, resumed, stop_after

from fastmoco.data.manifest_file import MANIFEST
from fastmoco.data.order import Order
from fastmoco.data.quarantine import ImagesGone, TooManyBad
from fastmoco.errors import UserError
from fastmoco.train.config import Config
from fastmoco.train.metrics import read_rows
from fastmoco.train.pretrain import Stopped, pretrain
from fastmoco.train.trainer import Trainer
from runs import draw_images, small_config

pytestmark = pytest.mark.usefixtures("undrawn")

# Six steps an epoch.
STEPS = 12


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "data")


def stopped_at(step: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Stopped):
            pretrain(config)


def changed(config: Config, **data: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_goes_on_where_files_went_bad(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loader: str
) -> None:
    config = small_config(images, tmp_path / "run", steps=STEPS, loader=loader, checkpoint_every=1000)
    stopped_at(6, config, monkeypatch)
    files = sorted(path.name for path in images.iterdir())
    (images / files[3]).unlink()
    (images / files[8]).write_bytes(b"not an image any more")
    # The list of the run stands; what is added since is no part of it.
    shutil.copy(images / files[0], images / "added.jpg")
    capsys.readouterr()
    out = pretrain(resumed(config))
    said = capsys.readouterr().out
    listed = (out / "bad_files.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in listed) == [files[3], files[8]]
    assert f"set aside {files[3]}: no such file" in said and f"set aside {files[8]}: changed since" in said
    assert "2 image(s) went bad and were replaced by others" in said
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[5]["bad_files"] == 0 and rows[-1]["bad_files"] == 2


@pytest.mark.system
def test_bad_files_change_nothing_about_resuming(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed after the damage, a run ends as one that only met the damage, bit for bit."""
    whole = small_config(images, tmp_path / "whole", steps=STEPS, checkpoint_every=1000)
    broken = small_config(images, tmp_path / "broken", steps=STEPS, checkpoint_every=1000)
    for config in (whole, broken):
        stopped_at(6, config, monkeypatch)
    for name in ("003.png", "010.jpg", "011.png"):
        (images / name).unlink()
    pretrain(resumed(whole))
    stopped_at(5, resumed(broken), monkeypatch)
    # Mended meanwhile: what was set aside stays aside.
    shutil.copy(images / "001.png", images / "003.png")
    pretrain(resumed(broken))
    expected, actual = final_tensors(whole.run.out), final_tensors(broken.run.out)
    assert all((value == actual[name]).all() for name, value in expected.items())
    rows = [loss_columns(config.run.out) for config in (whole, broken)]
    # How early a bad file is met depends on how far is read ahead.
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_too_many_bad_files_stop_the_run_which_can_go_on(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run", steps=STEPS, max_bad=0, checkpoint_every=1000)
    order = Order(24, 4, config.run.seed)
    # Read for the seventh step at the earliest, and damaged before.
    name = sorted(path.name for path in images.iterdir())[int(order.batch(6).indices[0])]
    with pytest.MonkeyPatch.context() as patch:
        at_step(1, lambda: (images / name).write_bytes(b""), patch)
        with pytest.raises(TooManyBad, match=rf"1 image.*--max-bad 0:\n  {name}.*\n.*higher --max-bad.*\nsaved "):
            pretrain(config)
    with pytest.raises(TooManyBad, match=rf"1 image.*--max-bad 0:\n  {name}"):
        pretrain(resumed(config))
    done = len(read_rows(config.run.out / "metrics.jsonl"))
    assert 0 < done <= 6
    pretrain(resumed(changed(config, max_bad=1)))
    assert len(read_rows(config.run.out / "metrics.jsonl")) == STEPS
    assert name in (config.run.out / "bad_files.txt").read_text()


def at_step(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `act` done as step `number` begins."""
    original = Trainer.step
    step = 0

    def acting(self: Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal step
        step += 1
        if step == number:
            act()
        original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", acting)


def test_when_all_images_are_gone_the_run_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(images, tmp_path / "run", steps=60, checkpoint_every=1000)
    at_step(3, lambda: images.rename(tmp_path / "unmounted"), monkeypatch)
    with pytest.raises(ImagesGone, match=r"of 20 images looked for .* none is there .*no such file(.*\n)*saved .*"):
        pretrain(config)
    done = len(read_rows(config.run.out / "metrics.jsonl"))
    assert done >= 3 and not (config.run.out / "bad_files.txt").exists()
    # Nothing was set aside: with the disk mounted again the run goes on as if nothing had been.
    with pytest.raises(ImagesGone, match="Is the disk mounted"):
        pretrain(resumed(config))
    (tmp_path / "unmounted").rename(images)
    monkeypatch.undo()
    stopped_at(3, resumed(config), monkeypatch)
    assert len(read_rows(config.run.out / "metrics.jsonl")) == done + 3
    assert not (config.run.out / "bad_files.txt").exists()


def test_the_knn_monitor_leaves_out_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score at the end of a run sets nothing aside and stops nothing."""
    images = draw_images(tmp_path / "data")
    for number, path in enumerate(sorted(images.iterdir())):
        (images / str(number % 2)).mkdir(exist_ok=True)
        path.rename(images / str(number % 2) / path.name)
    monkeypatch.chdir(images)
    config = small_config(Path("."), tmp_path / "run", max_bad=0, knn_every=1, checkpoint_every=1000)
    # Every image has been read for the last time.
    at_step(6, lambda: (images / "0" / "004.jpg").unlink(), monkeypatch)
    pretrain(config)
    row = read_rows(config.run.out / "metrics.jsonl")[-1]
    assert row["step"] == 6 and row["bad_files"] == 0 and 0 <= row["knn_accuracy"] <= 1


def test_the_knn_monitor_is_of_images_with_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_images(tmp_path / "data")
    names = sorted(path.name for path in images.iterdir())
    kinds = [("b", "", "a")[i % 3] for i in range(len(names))]
    (tmp_path / "l.csv").write_text("\n".join(["file,kind", *map(",".join, zip(names, kinds, strict=True))]) + "\n")
    seen: list[list[int]] = []
    monkeypatch.setattr(
        "fastmoco.train.monitor.monitor",
        lambda features, classes, patients: seen.append(classes.tolist()) or {"accuracy": 0.5},
    )
    given = {"labels": tmp_path / "l.csv", "label": ("kind",)}
    pretrain(small_config(images, tmp_path / "run", knn_every=1, checkpoint_every=1000, **given))
    assert seen and all(classes == ["ab".index(kind) for kind in kinds if kind] for classes in seen)
    # Of one class there is nothing to tell apart.
    (tmp_path / "l.csv").write_text((tmp_path / "l.csv").read_text().replace(",b\n", ",\n"))
    pretrain(small_config(images, tmp_path / "one", knn_every=1, checkpoint_every=1000, **given))
    assert all("knn_accuracy" not in row for row in read_rows(tmp_path / "one" / "metrics.jsonl"))


def test_a_run_among_the_images_is_refused(images: Path) -> None:
    for changes, option in (({"out": images / "run"}, "--out"), ({"stage": images / "disk"}, "--stage")):
        out = images.parent / "run"
        config = small_config(images, changes.pop("out", out), steps=1, **changes)
        with pytest.raises(UserError, match=f"{option} .* lies inside --data"):
            pretrain(config)


def test_a_run_on_one_shard_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "some.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, path.name)
    config = small_config(shard, tmp_path / "run", steps=8, checkpoint_every=1000)
    stopped_at(4, config, monkeypatch)
    pretrain(resumed(config))
    assert len(read_rows(config.run.out / "metrics.jsonl")) == 8
    assert not (config.run.out / "bad_files.txt").exists()


def test_a_moved_data_set_is_found_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_config(images, tmp_path / "whole", steps=STEPS, checkpoint_every=1000)
    config = small_config(images, tmp_path / "run", steps=STEPS, checkpoint_every=1000)
    pretrain(whole)
    stopped_at(6, config, monkeypatch)
    # A copy has other times.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in images.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    shutil.rmtree(images)
    pretrain(resumed(changed(config, data=moved)))
    assert not (config.run.out / "bad_files.txt").exists()
    expected, actual = final_tensors(whole.run.out), final_tensors(config.run.out)
    assert all((value == actual[name]).all() for name, value in expected.items())
    with pytest.raises(UserError, match="none is there"):
        pretrain(resumed(changed(config, data=tmp_path)))


def test_training_on_a_copy_is_training_on_the_original(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run", steps=3, stage=tmp_path / "disk")
    pretrain(config)
    copies = [path for path in (tmp_path / "disk").rglob("*") if path.suffix in (".jpg", ".png")]
    assert len(copies) == 24
    pretrain(small_config(images, tmp_path / "plain", steps=3))
    assert loss_columns(tmp_path / "run") == loss_columns(tmp_path / "plain")
    assert (tmp_path / "run" / MANIFEST).read_text() == (tmp_path / "plain" / MANIFEST).read_text()


def test_a_list_of_images_that_was_lost_is_made_again_from_the_same_images_only(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small_config(images, out, steps=2))
    listed = (out / "manifest.csv").read_bytes()
    (out / "manifest.csv").unlink()
    moved = images / "001.png"
    moved.rename(tmp_path / moved.name)
    with pytest.raises(UserError, match="not those that the run in"):
        pretrain(small_config(images, out, steps=2, resume=True))
    assert not (out / "manifest.csv").exists()
    (tmp_path / moved.name).rename(moved)
    pretrain(small_config(images, out, steps=2, resume=True))
    assert (out / "manifest.csv").read_bytes() == listed
